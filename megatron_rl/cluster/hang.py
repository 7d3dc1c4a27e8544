"""Explanation of a run that hangs: which process waits for which, by their heartbeats and stacks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from megatron_rl.utils import heartbeat
from megatron_rl.utils.format import duration
from megatron_rl.utils.heartbeat import IDLE, Beat

STACK_SECONDS = 20
"""Longest time to read the stack of one process."""
_COLLECTIVE = re.compile(
    r"^\s+(all_reduce|all_gather\w*|all_to_all\w*|reduce_scatter\w*|_?reduce|broadcast\w*|barrier|gather|scatter|i?recv|"
    r"i?send|batch_isend_irecv|wait)\b.*(distributed|torch|megatron)",
    re.MULTILINE,
)
"""Matches a stack frame of py-spy's output that is in a collective operation."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The state of one process, observed on its own node."""

    state: str
    """State by the operating system: running, sleeping, stopped, ..., or gone."""
    stack: str
    """py-spy's dump of all threads, or the reason why there is none."""

    @property
    def in_collective(self) -> bool:
        """Whether a thread of the process is in a collective operation."""
        return _COLLECTIVE.search(self.stack) is not None


def examine(pid: int) -> Evidence:
    """Examines a process of this node."""
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return Evidence("gone", "the process is gone: its log or the system log (out of memory?) may show why")
    # The folder of this Python comes first, because its environment need not be activated.
    py_spy = shutil.which("py-spy", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if py_spy is None:
        return Evidence(state, "py-spy is not installed on this node: pip install py-spy")
    try:
        found = subprocess.run(
            [py_spy, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=STACK_SECONDS,
        )
        stack = found.stdout or f"py-spy: {found.stderr.strip()}"
    except subprocess.TimeoutExpired:
        stack = f"py-spy did not finish within {STACK_SECONDS} s"
    return Evidence(state, stack)


def explain(beats: Sequence[Beat], evidence: Mapping[str, Evidence], quiet_seconds: float) -> str:
    """Describes what every process is doing and which process blocks the others.

    `evidence` is keyed by process name. Processes without evidence are assumed not to be in a collective operation.
    """
    return (
        f"no process has made progress for {duration(quiet_seconds)} (observability.hang_seconds).\n"
        f"{heartbeat.table(beats, time.time())}\n{_waiting_processes(beats, evidence)}"
    )


def _waiting_processes(beats: Sequence[Beat], evidence: Mapping[str, Evidence]) -> str:
    busy = [beat.process for beat in beats if beat.call != IDLE]
    if not busy:
        return "All processes are idle: the driver itself makes no progress."
    odd = {name: seen.state for name, seen in evidence.items() if seen.state in ("gone", "stopped", "zombie", "dead")}
    waiting = [name for name in busy if name in evidence and name not in odd and evidence[name].in_collective]
    others = [name for name in busy if name not in waiting]
    if odd:
        culprits = ", ".join(f"{name} ({state})" for name, state in odd.items())
        return f"{_list(waiting) or 'The driver'} {_verb(waiting)} for {culprits}."
    if waiting and others:
        return f"{_list(waiting)} {_verb(waiting)} in a collective operation for {_list(others)}, which is not in one."
    if waiting:
        return (
            f"{_list(waiting)} are all in a collective operation: check the network between them, and check in the "
            "stacks whether they are in the same operation."
        )
    return f"The driver waits for {_list(others)}; the stacks show what they are doing."


def _verb(names: Sequence[str]) -> str:
    return "wait" if len(names) > 1 else "waits"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
