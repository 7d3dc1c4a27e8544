"""Measurement of the time per phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Accumulates the seconds of each phase until `flush`. The start of each phase is announced."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce = announce
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.announce(name.replace("_", " "))
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """Returns `perf/<phase>_seconds` since the last call."""
        metrics = {f"perf/{name}_seconds": value for name, value in self.seconds.items()}
        self.seconds.clear()
        return metrics
