"""Waits for processes as long as they move, however busy the machine is.

A fixed number of seconds fails tests on a busy machine, where processes are slow but not stuck. A stuck process uses no
processor time, and an endless loop uses more of it than a test takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_rl.cluster.hang import examine

WINDOW_SECONDS = 180.0
MOVING_SECONDS = 2.0
"""Processes move if they have used this much processor time within the window. A single process does even if a hundred
others want the same two cores; deadlocked ranks and servers without requests do not."""
CEILING_SECONDS = 1800.0
"""Processor time that only an endless loop uses up."""
CHECK_SECONDS = 2.0
RAY = ("/ray/core/src/", "/ray/dashboard/", "/ray/_private/")
"""Parts of the command lines of Ray's own processes, which use processor time even if nothing moves."""


class Stuck(AssertionError):
    """The processes that a test waits for do not get anywhere."""


class Patience:
    """Follows the processor time of processes and of all their descendants."""

    def __init__(
        self,
        pids: Callable[[], Iterable[int]],
        what: str,
        *,
        window: float = WINDOW_SECONDS,
        ceiling: float = CEILING_SECONDS,
    ) -> None:
        self.pids, self.what, self.window, self.ceiling = pids, what, window, ceiling
        self._used: dict[psutil.Process, float] = {}
        self._mark, self._since = 0.0, time.monotonic()

    def check(self) -> None:
        """Raises Stuck, with the stacks of the processes, if they have not moved or have used too much."""
        for process in self._processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._used[process] = times.user + times.system
        used = sum(self._used.values())
        if used >= self._mark + MOVING_SECONDS:
            self._mark, self._since = used, time.monotonic()
        elif time.monotonic() - self._since > self.window:
            raise Stuck(self._report(f"used {used - self._mark:.1f} s of processor time in {self.window:.0f} s"))
        if used > self.ceiling:
            raise Stuck(self._report(f"used {used:.0f} s of processor time"))

    def _processes(self) -> set[psutil.Process]:
        found: set[psutil.Process] = set()
        for pid in self.pids():
            with suppress(psutil.Error):
                root = psutil.Process(pid)
                found |= {root, *root.children(recursive=True)}
        return {process for process in found if not _of_ray(process)}

    def _report(self, reason: str) -> str:
        stacks = []
        for process in self._processes():
            evidence = examine(process.pid)
            stacks.append(f"process {process.pid}, {evidence.state}\n{evidence.stack}")
        return "\n\n".join([f"{self.what}: the processes {reason}", *stacks])


def command_of(process: psutil.Process) -> list[str]:
    """Returns the process's command line; [] if it has ended, as any process may while a test looks at it."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_alive(process: psutil.Process) -> bool:
    """Returns whether the process has not ended. A zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _of_ray(process: psutil.Process) -> bool:
    line = " ".join(command_of(process))
    return any(part in line for part in RAY)


def wait_until(done: Callable[[], bool], pids: Iterable[int], what: str) -> None:
    """Blocks until `done()`. Raises Stuck if the processes do not move."""
    roots = list(pids)
    patience, checked = Patience(lambda: roots, what), time.monotonic()
    while not done():
        if time.monotonic() - checked > CHECK_SECONDS:
            patience.check()
            checked = time.monotonic()
        time.sleep(0.1)


def _roots(process: subprocess.Popen[str]) -> list[int]:
    """Returns the process and, under RAY_ADDRESS, the nodes of Ray that this test started: ranks descend from them."""
    if "RAY_ADDRESS" not in os.environ:
        return [process.pid]
    return [child.pid for child in psutil.Process().children()]


def start(command: Sequence[str], folder: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, with these further variables. Its output includes its errors."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def completed(
    command: Sequence[str], what: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; see `start` and `output_of`."""
    process = start(command, folder, **environment)
    output = output_of(process, what)
    return subprocess.CompletedProcess(command, process.returncode, output)


def output_of(process: subprocess.Popen[str], what: str) -> str:
    """Returns all that a process prints until its end. Kills its process group and raises Stuck if it does not move.

    The process must be one of `start`, in a session of its own.
    """
    patience = Patience(lambda: _roots(process), what)
    while True:
        try:
            return process.communicate(timeout=CHECK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            try:
                patience.check()
            except Stuck:
                os.killpg(process.pid, signal.SIGKILL)
                raise
