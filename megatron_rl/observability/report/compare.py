"""The curves of several runs in the same charts: one colour per group, seeds as a band around their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_rl.observability.metrics import Row, metric_names, series

from .curves import Chart, Line, build_charts
from .intervals import half_width
from .run_data import Group, RunData


def charts_of(groups: Sequence[Group]) -> list[Chart]:
    """Returns every chart for which some run has data, without those that are shown only above zero and are not.

    For a single group these are the charts of `build_charts`. Several groups share the charts, with one colour each and
    a chart per suite.
    """
    own = [_with_seeds(group) for group in groups]
    if len(own) == 1:
        return [chart for chart in own[0] if chart.is_shown]
    split = [[part for chart in charts for part in _by_suite(chart)] for charts in own]
    titles = dict.fromkeys(chart.title for charts in split for chart in charts)
    charts = [_side_by_side(title, groups, split) for title in titles]
    return [chart for chart in charts if chart.is_shown]


def _with_seeds(group: Group) -> list[Chart]:
    runs = [run.rows for run in group.runs]
    if len(runs) == 1:
        return [_with_intervals(chart, group.runs[0]) for chart in build_charts(runs[0])]
    mean, low, high = (_over_seeds(runs, how) for how in (lambda v: sum(v) / len(v), min, max))
    return [
        replace(chart, lines=[_banded(*lines) for lines in zip(chart.lines, lower.lines, upper.lines, strict=True)])
        for chart, lower, upper in zip(*map(build_charts, (mean, low, high)), strict=True)
    ]


def _with_intervals(chart: Chart, run: RunData) -> Chart:
    """Adds the intervals of evaluation metrics whose graded problems the run has kept."""
    lines = []
    for line in chart.lines:
        widths = [half_width(run, line.suite, line.kind, int(step)) for step in line.x] if line.suite else []
        known = any(width is not None for width in widths)
        lines.append(replace(line, error=[width or 0.0 for width in widths]) if known else line)
    return replace(chart, lines=lines)


def _banded(mean: Line, low: Line, high: Line) -> Line:
    """Returns the mean with its band. All three are smoothed in the same way, so that the mean stays in the band."""
    return replace(mean, y=mean.smooth or mean.y, smooth=None, low=low.smooth or low.y, high=high.smooth or high.y)


def _over_seeds(runs: Sequence[Sequence[Row]], how: Callable[[list[float]], float]) -> list[Row]:
    """Combines each metric over the seeds that have a value for it, and returns one row per step."""
    rows: dict[int, Row] = {}
    for name in dict.fromkeys(name for run in runs for name in metric_names(run)):
        by_step: dict[int, list[float]] = {}
        for run in runs:
            for step, value in zip(*series(run, name), strict=True):
                by_step.setdefault(step, []).append(value)
        for step, values in by_step.items():
            rows.setdefault(step, {"step": step})[name] = how(values)
    return [rows[step] for step in sorted(rows)]


def _by_suite(chart: Chart) -> list[Chart]:
    """Splits a chart, so that colours can stand for runs alone: the lines of training, and those of each suite."""
    suites = list(dict.fromkeys(line.suite for line in chart.lines))
    if len(suites) == 1 and not suites[0]:
        return [chart]
    return [
        replace(
            chart,
            title=f"{chart.title}: {suite}" if suite else chart.title,
            lines=[line for line in chart.lines if line.suite == suite],
        )
        for suite in suites
    ]


def _side_by_side(title: str, groups: Sequence[Group], own: Sequence[Sequence[Chart]]) -> Chart:
    charts = {i: chart for i, part in enumerate(own) for chart in part if chart.title == title}
    first = next(iter(charts.values()))
    if first.stacked:  # the areas of several runs would hide each other
        return replace(
            first, caption="Mean over the steps so far.", stacked=False, bars=True, lines=_bars(groups, charts)
        )
    lines = [
        replace(line, name=groups[i].label, color=i, kind=line.kind or line.name)
        for i, chart in charts.items()
        for line in chart.lines
    ]
    return replace(first, lines=lines, several=True, log=any(chart.log for chart in charts.values()))


def _bars(groups: Sequence[Group], charts: Mapping[int, Chart]) -> list[Line]:
    """Returns one bar per group, stacked from the mean of each line over all steps."""
    names = dict.fromkeys(line.name for chart in charts.values() for line in chart.lines)
    bars = []
    for color, name in enumerate(names):
        means = {
            groups[i].label: sum(line.y) / max(len(other.y) for other in chart.lines)
            for i, chart in charts.items()
            for line in chart.lines
            if line.name == name
        }
        bars.append(Line(name, list(means), list(means.values()), color))
    return bars
