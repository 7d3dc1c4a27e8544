"""Shows two runs that train at the same time in one view: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_rl.observability.metrics import Row, read_metrics, series
from megatron_rl.utils.format import duration, number, sparkline

MEASURES = {
    "reward": "reward/mean",
    "entropy": "entropy/token_mean",
    "response length": "response_length/mean",
    "fresh problems: accuracy": "eval/fresh/avg@8",
    "fresh problems: pass@8": "eval/fresh/pass@8",
    "p(wait after a failed attempt)": "eval/fresh/p_wait_after_no",
}
SPARKLINE_WIDTH = 16
WIDE = 90
"""Terminal width, in columns, from which the panel shows histories."""
PLAIN_EVERY_SECONDS = 10.0


@dataclass
class Watched:
    """One of the runs, as far as its files show it."""

    label: str
    folder: Path
    output: Path
    """File with the standard output of the run."""
    steps: int
    """Number of steps of the whole run."""
    rows: list[Row] = field(default_factory=list)

    def read(self) -> None:
        self.rows = read_metrics(self.folder)

    @property
    def step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its report, which it does last."""
        return (self.folder / "report.html").is_file()

    @property
    def last_line(self) -> str:
        """What the run printed last: before the first step, what it is doing."""
        lines = self.output.read_text(errors="replace").splitlines() if self.output.is_file() else []
        return next((line for line in reversed(lines) if line.strip()), "")


class Progress:
    """The common view of all runs. `update` reads their files; it is called about once a second."""

    def __init__(self, runs: Sequence[Watched], console: Console) -> None:
        self.runs, self.console = runs, console
        self.start = time.monotonic()
        self._last_line = -PLAIN_EVERY_SECONDS
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False) if live else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.update(last=True)
        if self._live:
            self._live.stop()

    def update(self, *, last: bool = False) -> None:
        for run in self.runs:
            run.read()
        if self._live:
            self._live.update(self.render(), refresh=True)
        elif last or time.monotonic() - self._last_line >= PLAIN_EVERY_SECONDS:
            self._last_line = time.monotonic()
            print(" | ".join(_line(run) for run in self.runs), flush=True)

    def render(self) -> RenderableType:
        table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for run in self.runs:
            table.add_column(run.label, justify="right", no_wrap=True)
            if self._has_room:
                table.add_column("", no_wrap=True, width=SPARKLINE_WIDTH, style="cyan")
        for label, metric in MEASURES.items():
            cells: list[RenderableType] = [label]
            for run in self.runs:
                values = series(run.rows, metric)[1]
                cells.append(Text(number(values[-1]) if values else "-", style="bold"))
                if self._has_room:
                    cells.append(sparkline(values, SPARKLINE_WIDTH))
            table.add_row(*cells)
        return Panel(
            Group(self._bars(), Text(), table),
            title="GRPO and Lp-Reg from the same warm start, on the same prompts",
            title_align="left",
            subtitle=f"{duration(time.monotonic() - self.start)} elapsed",
            subtitle_align="right",
            width=min(self.console.width, 110),
            border_style="dim",
        )

    @property
    def _has_room(self) -> bool:
        """Whether the terminal is wide enough for the histories."""
        return self.console.width >= WIDE

    def _bars(self) -> Table:
        bars = Table.grid(expand=True, padding=(0, 1))
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        bars.add_column(no_wrap=True, overflow="ellipsis", max_width=48 if self._has_room else 20, style="dim")
        for run in self.runs:
            says = "" if 0 < run.step < run.steps else "finished" if run.is_finished else run.last_line
            bars.add_row(f"{run.label} {run.step}/{run.steps}", ProgressBar(total=run.steps, completed=run.step), says)
        return bars


def _line(run: Watched) -> str:
    if not run.step:
        return f"{run.label}: {run.last_line}"
    values = {label: series(run.rows, metric)[1] for label, metric in MEASURES.items()}
    shown = [f"{label.removeprefix('fresh problems: ')} {number(each[-1])}" for label, each in values.items() if each]
    return f"{run.label}: step {run.step}/{run.steps}, {', '.join(shown)}"
