"""Runs targets of the Makefile, two at a time. If one fails, the others go on: one run tells all that fails.

    python tools/side_by_side.py TARGET...

Targets start in the given order. What a target prints goes to `build/parts/TARGET.log`; this script prints a line when
it starts and one when it ends. What failed targets printed comes last. Ctrl-C interrupts the targets that run.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

AT_A_TIME = 2
LOGS = Path("build/parts")
GRACE_SECONDS = 120.0
"""How long an interrupted target may take to end what it has started."""


class Part:
    """A target that runs."""

    def __init__(self, target: str) -> None:
        self.target, self.log, self.since = target, LOGS / f"{target}.log", time.monotonic()
        with self.log.open("wb") as output:
            command = ["make", "--no-print-directory", target]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        print(f"{target} starts: {self.log}", flush=True)

    def ended(self) -> bool:
        """Returns whether the target has ended, and if so, prints how."""
        before = processor_time()
        if self.process.poll() is None:
            return False
        # A process's time is added, with that of all that it has waited for, when it is waited for: by `poll`.
        took, used = clock(time.monotonic() - self.since), clock(processor_time() - before)
        last = (self.log.read_text(errors="replace").rstrip().splitlines() or [""])[-1].strip("= ")
        status = self.process.returncode
        print(f"{self.target} ended after {took} ({used} of processor time) with {status}: {last}", flush=True)
        return True


def processor_time() -> float:
    """Returns the seconds of processor time of all processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


def interrupt(parts: Iterable[Part]) -> None:
    """Ends the parts, with what they have started."""
    parts = list(parts)
    for part in parts:
        with suppress(ProcessLookupError):  # it has ended in the meantime
            os.killpg(part.process.pid, signal.SIGINT)
    until = time.monotonic() + GRACE_SECONDS
    for part in parts:
        try:
            part.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(part.process.pid, signal.SIGKILL)
            part.process.wait()
        print(f"{part.target} was interrupted", flush=True)


def run(targets: Iterable[str], stop: threading.Event) -> list[Part]:
    """Runs the targets and returns those that fail. If `stop` is set, those that run are interrupted, and fail."""
    waiting, running, failed = deque(targets), list[Part](), list[Part]()
    while (waiting or running) and not stop.is_set():
        while waiting and len(running) < AT_A_TIME:
            running.append(Part(waiting.popleft()))
        time.sleep(0.2)
        for part in [part for part in running if part.ended()]:
            running.remove(part)
            if part.process.returncode:
                failed.append(part)
    interrupt(running)
    return failed + running


if __name__ == "__main__":
    # An exception in the midst of a start would leave a part that nobody knows. A shell that starts this script in the
    # background makes it ignore SIGINT, and the parts would inherit that.
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    LOGS.mkdir(parents=True, exist_ok=True)
    failed = run(sys.argv[1:], stop)
    for part in failed:
        print(f"\n{part.log}:\n{part.log.read_text(errors='replace')}\n{part.target} failed", flush=True)
    sys.exit(bool(failed))
