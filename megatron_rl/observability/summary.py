"""The before-and-after table of a run's evaluations, and the list of the files that the run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.observability.metrics import Row, metric_names, read_metrics, series
from megatron_rl.utils.format import number

PLACES = (
    ("report", "report.html"),
    ("exported model (HF format)", "hf"),
    ("checkpoints", "checkpoints"),
    ("metrics", "metrics.jsonl"),
    ("warnings", "warnings.jsonl"),
    ("rollouts", "rollouts"),
    ("TensorBoard", "tensorboard"),
    ("configuration", "config.yaml"),
    ("profiles", "profile"),
    ("logs", "logs"),
)


@dataclass(frozen=True, slots=True)
class Change:
    """One evaluation metric of one suite before and after training. `last` is None after a single evaluation."""

    suite: str
    metric: str
    """Name of the metric, such as `avg@8`."""
    label: str
    first: float
    first_step: int
    last: float | None
    last_step: int | None
    best: float | None
    """Highest value, for accuracy and pass@k only. For other metrics, neither high nor low values are better."""
    best_step: int | None

    @property
    def difference(self) -> float | None:
        return None if self.last is None else self.last - self.first


def suite_metrics(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the metrics of each suite (`avg@8`, `pass@8`, `entropy`, ...).

    Accuracy comes first, then the other standard metrics, then probes.
    """
    suites: dict[str, list[str]] = {}
    for name in metric_names(rows):
        if name.startswith("eval/") and name.count("/") >= 2:
            suite, metric = name.removeprefix("eval/").rsplit("/", 1)
            suites.setdefault(suite, []).append(metric)
    return {suite: sorted(metrics, key=_rank) for suite, metrics in suites.items()}


def is_probe(metric: str) -> bool:
    """Returns whether an evaluation metric is a probe, which the configuration defines by name."""
    return _rank(metric)[0] == len(_ORDER)


def metric_label(metric: str) -> str:
    """Returns the label of an evaluation metric, such as `accuracy (avg@8)` for `avg@8`."""
    return f"accuracy ({metric})" if metric.startswith("avg") else _LABELS.get(metric, metric)


def before_and_after(rows: Sequence[Row]) -> list[Change]:
    """Returns every evaluation metric at its first and last evaluation, suite by suite."""
    changes = []
    for suite, metrics in suite_metrics(rows).items():
        for metric in metrics:
            steps, values = series(rows, f"eval/{suite}/{metric}")
            best = max(range(len(values)), key=values.__getitem__) if metric.startswith(("avg", "pass@")) else None
            changes.append(
                Change(
                    suite=suite,
                    metric=metric,
                    label=metric_label(metric),
                    first=values[0],
                    first_step=steps[0],
                    last=values[-1] if len(values) > 1 else None,
                    last_step=steps[-1] if len(values) > 1 else None,
                    best=None if best is None else values[best],
                    best_step=None if best is None else steps[best],
                )
            )
    return changes


def print_summary(console: Console, run_folder: Path) -> None:
    """Prints the before-and-after table, if anything was evaluated, and the paths of the run's files."""
    changes = before_and_after(read_metrics(run_folder))
    if changes:
        console.print(_table(changes))
    console.print(Text("Where everything is", style="bold"))
    for label, name in PLACES:
        if (run_folder / name).exists():
            # A path is never wrapped, so that it can be copied.
            console.print(Text(f"  {label:<28}{run_folder / name}"), soft_wrap=True)


def _table(changes: Sequence[Change]) -> Table:
    first, last = changes[0].first_step, changes[0].last_step
    steps = f"step {first}" if last is None else f"steps {first} and {last}"
    table = Table(title=f"Before and after ({steps})", title_justify="left", title_style="bold")
    for name in ("suite", "measure"):
        table.add_column(name)
    for name in ("before", "after", "change", "best"):
        table.add_column(name, justify="right", no_wrap=True)
    suite = None
    for change in changes:
        if suite is not None and suite != change.suite:
            table.add_section()
        best = "" if change.best is None else f"{number(change.best)} (step {change.best_step})"
        difference = "" if change.difference is None else signed(change.difference)
        table.add_row(
            Text("" if suite == change.suite else change.suite),
            Text(change.label),
            number(change.first),
            number(change.last),
            difference,
            best,
        )
        suite = change.suite
    return table


def signed(value: float) -> str:
    """Formats a difference with its sign: `+0.451`, `-0.083`."""
    return f"+{number(value)}" if value >= 0 else number(value)


_LABELS = {
    "response_length": "response length",
    "truncated_fraction": "truncated share",
    "failed_fraction": "not graded share",
    "turns_mean": "turns",
    "tool_calls_mean": "tool calls",
    "tool_errors_mean": "tool errors",
}
_ORDER = ("avg", "pass@", "maj@", "entropy", *_LABELS)


def _rank(metric: str) -> tuple[int, str]:
    return next((i for i, start in enumerate(_ORDER) if metric.startswith(start)), len(_ORDER)), metric
