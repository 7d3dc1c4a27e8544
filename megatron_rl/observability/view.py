"""The interface of a run's progress view, and its plain form of one line at a time."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from megatron_rl.observability.metrics import Row
from megatron_rl.utils.format import duration, number

Metrics = Mapping[str, float | None]

PLAIN_EVERY_STEPS = 10
PLAIN_EVERY_SECONDS = 10.0

PLAIN_METRICS = (
    ("reward", "reward/mean"),
    ("entropy", "entropy/token_mean"),
    ("length", "response_length/mean"),
    ("truncated", "response_length/truncated_fraction"),
    ("selected", "lpreg/selected_fraction"),
    ("tokens/s", "perf/tokens_per_second"),
)
FAILURE_METRICS = (("timeouts", "reward/timeout_fraction"), ("errors", "reward/error_fraction"))
"""Shares of the samples that got no reward. Views show them only if they are above zero."""


class View:
    """The interface of all views. This base class is the view `off`, which shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the state of the terminal, also after an error."""

    def history(self, rows: Sequence[Row]) -> None:
        """Takes over what a resumed run has logged before, without printing it."""

    def phase(self, name: str) -> None:
        """Announces the phase that starts now: "warm start", "rollout", "train", "evaluate", ..."""

    def warm_start(self, step: int, total: int, loss: float, seconds_left: float | None) -> None:
        """Shows a finished step of the supervised warm start."""

    def step(self, step: int, metrics: Metrics) -> None:
        """Shows a finished RL step with its metrics under their full names. Steps are ascending."""

    def eval(self, step: int, metrics: Metrics) -> None:
        """Shows a finished evaluation with its `eval/<suite>/...` metrics."""

    def message(self, text: str) -> None:
        """Prints a permanent line."""


class TimeLeft:
    """Estimates the seconds to the last step from the last 50 steps, including the time between them."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._clock = clock
        self._done: deque[tuple[int, float]] = deque(maxlen=50)

    def step(self, step: int) -> None:
        self._done.append((step, self._clock()))

    def seconds(self) -> float | None:
        done = list(self._done)
        if len(done) < 2:
            return None
        (first, start), (last, end) = done[0], done[-1]
        return (end - start) / (last - first) * (self._total - last) - (self._clock() - end)


class Lines(Protocol):
    """Takes lines of text, as a text file does."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...


class PlainView(View):
    """Prints a line of `name=value` pairs every 10 steps or 10 seconds, and a line per evaluated suite."""

    def __init__(
        self, total_steps: int, title: str, stream: Lines | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total_steps
        self._title = title
        self._stream = stream or sys.stdout
        self._clock = clock
        self._time_left = TimeLeft(total_steps, clock)
        self._phases: set[str] = set()
        self._last_time = -float("inf")

    def __enter__(self) -> Self:
        self.message(f"{self._title}: {self._total} steps")
        return self

    def phase(self, name: str) -> None:
        # Phases repeat in every step, so each is printed only once.
        if name not in self._phases:
            self._phases.add(name)
            self.message(f"phase={name.replace(' ', '_')}")

    def warm_start(self, step: int, total: int, loss: float, seconds_left: float | None) -> None:
        if self._is_time(anyway=step == total):
            self.message(f"warm_start={step}/{total} loss={number(loss)} left={_compact(seconds_left)}")

    def step(self, step: int, metrics: Metrics) -> None:
        self._time_left.step(step)
        if self._is_time(anyway=step % PLAIN_EVERY_STEPS == 0 or step in (1, self._total)):
            values = [f"{label}={number(metrics[name])}" for label, name in PLAIN_METRICS if name in metrics]
            values += [
                f"{label}={number(share)}" for label, name in FAILURE_METRICS if (share := metrics.get(name) or 0) > 0
            ]
            left = f"left={_compact(self._time_left.seconds())}"
            self.message(" ".join([f"step={step}/{self._total}", *values, left]))

    def eval(self, step: int, metrics: Metrics) -> None:
        suites: dict[str, list[str]] = {}
        for name, value in metrics.items():
            suite, _, metric = name.removeprefix("eval/").rpartition("/")
            suites.setdefault(suite, []).append(f"{metric}={number(value)}")
        for suite, values in suites.items():
            self.message(" ".join([f"eval step={step} suite={suite}", *values]))

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _is_time(self, *, anyway: bool) -> bool:
        now = self._clock()
        if anyway or now - self._last_time >= PLAIN_EVERY_SECONDS:
            self._last_time = now
            return True
        return False


def _compact(seconds: float | None) -> str:
    """Formats a duration without spaces, so that a line can be split at its spaces."""
    return duration(seconds).replace(" ", "")
