"""The live view: a panel at the bottom of the terminal, with messages scrolling above it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_rl.observability.metrics import Row
from megatron_rl.observability.view import FAILURE_METRICS, Metrics, TimeLeft, View
from megatron_rl.utils.format import ASCII_BLOCKS, BLOCKS, duration, number, sparkline

REFRESH_PER_SECOND = 2
"""Refresh rate of the panel. A higher rate would take time from the run on a small machine."""
MAX_EVALUATION_ROWS = 4
SPARKLINE_WIDTH = 24
NARROW = 60
"""Terminal width, in columns, below which the panel omits history and elapsed time."""
WARM_START_LOSS = "warm-start loss"

STEP_ROWS = {
    "entropy/token_mean": "entropy",
    "response_length/mean": "response length",
    "response_length/truncated_fraction": "truncated share",
    "lpreg/selected_fraction": "selected share",
    "perf/tokens_per_second": "tokens/s",
    "perf/model_flops_utilisation": "actor's utilisation",
}
FAILURE_ROWS = {name: label for label, name in FAILURE_METRICS}
RECORDED = ("reward/mean", *FAILURE_ROWS, *STEP_ROWS)


class LiveView(View):
    """Shows progress, remaining time, phase, and the main metrics with first value, latest value and history."""

    def __init__(
        self, total_steps: int, title: str, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._console = console
        self._clock = clock
        self._start = clock()
        self._total = total_steps
        self._step = 0
        self._time_left = TimeLeft(total_steps, clock)
        self._phase = "starting"
        self._is_over = False
        self._phase_start = self._start
        self._warm_start: tuple[int, int, float | None] | None = None
        self._history: dict[str, list[float]] = {}
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=False
        )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        self.phase("finished" if kind is None else "stopped")
        self._live.__exit__(kind, error, traceback)

    def history(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._step = max(self._step, row["step"])
            self.eval(row["step"], {name: value for name, value in row.items() if name.startswith("eval/")})
            for name in RECORDED:
                self._record(name, row.get(name))

    def phase(self, name: str) -> None:
        self._phase = name
        self._phase_start = self._clock()

    def warm_start(self, step: int, total: int, loss: float, seconds_left: float | None) -> None:
        self._warm_start = (step, total, seconds_left)
        self._record(WARM_START_LOSS, loss)

    def step(self, step: int, metrics: Metrics) -> None:
        self._warm_start = None
        self._step = step
        self._time_left.step(step)
        for name in RECORDED:
            self._record(name, metrics.get(name))

    def eval(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name.rsplit("/", 1)[-1].startswith(("avg@", "pass@")):
                self._record(name, value)

    def message(self, text: str) -> None:
        self._console.print(Text(text))

    def render(self) -> RenderableType:
        """Renders the panel, which has at most 16 lines whatever the number of suites. rich's thread calls this."""
        body = Group(self._progress(), Text(), self._table()) if self._history else self._progress()
        since = duration(self._clock() - self._phase_start)
        return Panel(
            body,
            title=Text(self._title, style="bold", overflow="ellipsis"),
            title_align="left",
            subtitle=Text(self._phase if self._is_over else f"{self._phase}, {since}", style="cyan"),
            subtitle_align="right",
            width=min(self._console.width, 100),
            border_style="dim",
        )

    @property
    def _is_narrow(self) -> bool:
        return self._console.width < NARROW

    def _progress(self) -> Table:
        warm_start = self._warm_start
        if warm_start is not None:
            step, total, left = warm_start
            name = f"warm start {step}/{total}"
        else:
            step, total, left = self._step, self._total, self._time_left.seconds()
            name = f"step {step}/{total}"
        times = [] if self._is_narrow else [f"{duration(self._clock() - self._start)} elapsed"]
        if left is not None and step < total:
            times.append(f"{duration(left)} left")
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_row(Text(name, style="bold"), ProgressBar(total=total, completed=step), ", ".join(times))
        return line

    def _table(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
        table.add_column("", no_wrap=True, ratio=1)
        table.add_column("now", justify="right", no_wrap=True)
        table.add_column("first", justify="right", no_wrap=True, style="dim")
        if not self._is_narrow:
            table.add_column("history", no_wrap=True, width=SPARKLINE_WIDTH, style="cyan")
        blocks = ASCII_BLOCKS if self._console.options.ascii_only else BLOCKS
        for name, label in self._rows():
            values = self._history[name]
            cells: list[RenderableType] = [Text(label), Text(number(values[-1]), style="bold"), number(values[0])]
            if not self._is_narrow:
                cells.append(sparkline(values, SPARKLINE_WIDTH, blocks))
            table.add_row(*cells)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        """Returns metric and label of each row with a value: reward, shares of failed samples if some failed, the first
        suites' evaluations, other metrics."""
        failures = {name: label for name, label in FAILURE_ROWS.items() if any(self._history.get(name, ()))}
        most = MAX_EVALUATION_ROWS - len(failures)
        evaluations = [name for name in list(self._history) if name.startswith("eval/")][:most]
        labels = {"reward/mean": "reward"} if self._warm_start is None else {WARM_START_LOSS: WARM_START_LOSS}
        labels |= failures
        for name in evaluations:
            suite, metric = name.removeprefix("eval/").rsplit("/", 1)
            labels[name] = f"{suite} {'accuracy' if metric.startswith('avg@') else metric}"
        labels |= STEP_ROWS
        return [(name, label) for name, label in labels.items() if name in self._history]

    def _record(self, name: str, value: float | None) -> None:
        if value is not None:
            self._history.setdefault(name, []).append(value)
