"""Ctrl-C and SIGTERM end a run in order: the step is finished, a checkpoint written. A second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from megatron_rl.observability.view import View


@dataclass
class Stop:
    requested: bool = False


@contextmanager
def stop_on_interrupt(view: View) -> Iterator[Stop]:
    """A flag that the first signal sets; the loop looks at it between steps."""
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        view.message(f"{signal.Signals(number).name}: finishing this step, then a checkpoint (again: stop at once)")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
