"""Ctrl-C and SIGTERM stop a run after its current step, with a checkpoint. A second signal stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Set by the first signal. The loop checks it between steps."""

    requested: bool = False


FIRST = (
    "{signal}: the run stops after this step, with a checkpoint. A second {signal} stops it at once, and loses the "
    "steps since the last checkpoint"
)


@contextmanager
def stop_on_interrupt(announce: Callable[[str], None]) -> Iterator[Stop]:
    """Handles both signals in the block. Yields the Stop that the first one sets; a second raises KeyboardInterrupt.

    `announce` shows the user what the first signal does, and what a second one would do.
    """
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        announce(FIRST.format(signal="Ctrl-C" if number == signal.SIGINT else "SIGTERM"))

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals; a caller who trains in another handles them itself
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
