"""Why a run does not go on: who waits for whom, from the processes' heartbeats and stacks."""

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
"""How long one process's stack may take to read."""
_COLLECTIVE = re.compile(
    r"^\s+(all_reduce|all_gather\w*|all_to_all\w*|reduce_scatter\w*|_?reduce|broadcast\w*|barrier|gather|scatter|i?recv|"
    r"i?send|batch_isend_irecv|wait)\b.*(distributed|torch|megatron)",
    re.MULTILINE,
)
"""A frame of py-spy's that stands in a collective operation."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What could be seen of one process from its own node."""

    state: str
    """As the system says: running, sleeping, stopped, ... or gone."""
    stack: str
    """py-spy's dump of all threads, or why there is none."""

    @property
    def in_collective(self) -> bool:
        return _COLLECTIVE.search(self.stack) is not None


def examine(pid: int) -> Evidence:
    """Called on the process's node."""
    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return Evidence("gone", "the process is gone: its log, and the system's (out of memory?), may say why")
    # Beside this Python first: an environment need not be activated.
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
        stack = f"py-spy had no answer after {STACK_SECONDS} s"
    return Evidence(state, stack)


def explain(beats: Sequence[Beat], seen: Mapping[str, Evidence], quiet_seconds: float) -> str:
    """seen: process -> evidence."""
    return (
        f"no process has made progress for {duration(quiet_seconds)} (observability.hang_seconds).\n"
        f"{heartbeat.table(beats, time.time())}\n{_who_waits_for_whom(beats, seen)}"
    )


def _who_waits_for_whom(beats: Sequence[Beat], seen: Mapping[str, Evidence]) -> str:
    busy = [beat.process for beat in beats if beat.call != IDLE]
    if not busy:
        return "All of them are idle: it is the driver itself that does not go on."
    odd = {name: seen[name].state for name in seen if seen[name].state in ("gone", "stopped", "zombie", "dead")}
    waiting = [name for name in busy if name in seen and name not in odd and seen[name].in_collective]
    others = [name for name in busy if name not in waiting]
    if odd:
        culprits = ", ".join(f"{name} ({state})" for name, state in odd.items())
        return f"{_list(waiting) or 'The driver'} {_verb(waiting)} for {culprits}."
    if waiting and others:
        return f"{_list(waiting)} {_verb(waiting)} in a collective operation for {_list(others)}, which is not in one."
    if waiting:
        return (
            f"{_list(waiting)} are all in a collective operation: look at the network between them, and whether they "
            "are in the same one (stacks)."
        )
    return f"The driver waits for {_list(others)}; the stacks say where it is."


def _verb(names: Sequence[str]) -> str:
    return "wait" if len(names) > 1 else "waits"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
