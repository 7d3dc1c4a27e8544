"""Writing of the report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_rl.config.observability import WORD_CLASSES
from megatron_rl.observability.metrics import series
from megatron_rl.observability.summary import Change, before_and_after, signed
from megatron_rl.utils.files import atomically
from megatron_rl.utils.format import duration, number

from . import token_figures
from .compare import charts_of
from .configuration import chosen_settings, config_lines, differences
from .curves import as_json
from .intervals import Difference, difference, half_width, per_problem
from .rarity import rarity_figure
from .responses import response_groups
from .run_data import RunData, group_runs, read_run
from .token_figures import Classes, Figure
from .tokens import Vocabulary, read_candidates, read_ids, read_tokens
from .verdict import verdict

FIGURE_STEPS = 5
"""Number of rollout dumps in the token figures, including the first and the last."""
VIEWER_STEPS = 3
"""Number of rollout dumps in the viewer of responses."""


def write_report(folders: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Writes the report of one run, or of several runs side by side, and returns its path.

    The default for `output` is `report.html` in the run's folder, or in the working folder for several runs. The report
    of a run in progress, an interrupted run or an empty folder shows whatever exists. Raises UserError if a folder does
    not exist, a file in it is broken, or the report cannot be written.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    runs = [read_run(folder) for folder in folders]
    path = output or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    with atomically(path) as partial:
        partial.write_text(render(runs), encoding="utf-8")
    return path


def environment() -> Environment:
    """Returns the environment of the page templates."""
    return Environment(
        loader=PackageLoader("megatron_rl.observability.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(runs: Sequence[RunData], refresh_seconds: int = 0) -> str:
    """Returns the page. With `refresh_seconds` it loads itself again, which a page that is served live does."""
    groups = group_runs(runs)
    charts = charts_of(groups)
    classes = _word_classes(runs)
    shared, per_run = _token_figures(runs, classes)
    rarity = [figure for figure in [rarity_figure(groups)] if figure.traces]
    figures = [*rarity, *shared, *(figure for own in per_run for figure in own["figures"])]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=runs[0].name if len(runs) == 1 else " and ".join(group.label for group in groups),
            runs=[
                {
                    "name": run.name,
                    "facts": _facts(run),
                    "changes": [(change, *_intervals(run, change)) for change in before_and_after(run.rows)],
                    "findings": run.findings,
                    "provenance": run.provenance,
                }
                for run in runs
            ],
            verdict=verdict(groups),
            changes=_changes(runs),
            configurations=[_configuration(run) for run in runs],
            differences=differences(runs) if len(runs) > 1 else [],
            charts=charts,
            rarity_figures=rarity,
            shared_figures=shared,
            token_figures=per_run,
            figures=figures,
            responses=_responses(runs),
            data={
                "charts": [as_json(chart) for chart in charts],
                "figures": [
                    {"traces": figure.traces, "layout": figure.layout, "height": figure.height} for figure in figures
                ],
            },
            smoothed=any(line.smooth for chart in charts for line in chart.lines),
            banded=any(line.low for chart in charts for line in chart.lines),
            refresh=refresh_seconds,
            number=number,
            signed=signed,
            plotly=Markup(get_plotlyjs()),
        )
    )


def _intervals(run: RunData, change: Change) -> tuple[float | None, float | None, Difference | None]:
    """Returns the half-widths of the first and the last value, and the paired change; None for what is not known."""
    first = half_width(run, change.suite, change.metric, change.first_step)
    if change.last_step is None:
        return first, None, None
    values = [per_problem(run, change.suite, change.metric, step) for step in (change.last_step, change.first_step)]
    last = half_width(run, change.suite, change.metric, change.last_step)
    return first, last, difference([values[0]], [values[1]])


def _configuration(run: RunData) -> dict[str, Any]:
    """Returns the lines of the run's configuration, and the settings that are not defaults if sources are stated."""
    text = run.config_text
    return {"name": run.name, "lines": config_lines(text), "chosen": chosen_settings(text)}


def _changes(runs: Sequence[RunData]) -> dict[tuple[str, str], list[Change | None]]:
    """Returns each run's change per (suite, measure), None for a run without that measure."""
    own = [{(change.suite, change.label): change for change in before_and_after(run.rows)} for run in runs]
    return {key: [changes.get(key) for changes in own] for key in dict.fromkeys(key for part in own for key in part)}


def _token_figures(runs: Sequence[RunData], classes: Classes) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Returns the figures that all runs share, and each run's own figures and word clouds."""
    recorded = [run for run in runs if run.dumps]
    per_run, frequencies, likelihoods = [], [], []
    for run in recorded:
        vocabulary = _vocabulary(run)
        ids = ((step, read_ids(path)) for step, path in run.dumps)
        frequencies.append((run.name, token_figures.frequency(ids, vocabulary, classes)))
        candidates = ((step, *read_candidates(path)) for step, path in run.candidates)
        likelihoods.append((run.name, token_figures.candidate_probability(candidates, vocabulary, classes)))
        tables = [read_tokens(step, path) for step, path in spread(run.dumps, FIGURE_STEPS)]
        last = tables[-1]
        figures = [token_figures.violins(tables, vocabulary, classes), token_figures.scatter(last, vocabulary, classes)]
        per_run.append(
            {
                "name": run.name,
                "figures": [figure for figure in figures if figure.traces],
                "clouds": token_figures.clouds(last, vocabulary, classes),
            }
        )
    shared = [token_figures.frequency_figure(frequencies), token_figures.candidate_figure(likelihoods)]
    return [figure for figure in shared if figure.traces], per_run


def _responses(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    return [
        {"run": run.name, **group}
        for run in runs
        for group in response_groups(spread(run.dumps, VIEWER_STEPS), _vocabulary(run))
    ]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Returns at most `count` of the items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _vocabulary(run: RunData) -> Vocabulary:
    model = run.setting("model", "path")
    return Vocabulary([run.folder, run.folder / "hf", *([Path(str(model))] if model else [])])


def _word_classes(runs: Sequence[RunData]) -> Classes:
    """Returns the word classes of the first run, or those of the paper if it has none."""
    found = runs[0].setting("observability", "word_classes")
    return found if isinstance(found, dict) else WORD_CLASSES


def _facts(run: RunData) -> list[tuple[str, str]]:
    """Returns the facts under the title: algorithm, model, steps, duration and time."""
    algorithm = " ".join(str(run.setting("algorithm", key) or "") for key in ("name", "preset")).strip()
    steps, total = max((row["step"] for row in run.rows), default=0), run.setting("train", "steps")
    done = f"{steps} of {total}" if total is not None else str(steps)
    if isinstance(total, int) and steps < total:
        done += " (in progress or interrupted)"
    facts = [("Algorithm", algorithm), ("Model", str(run.setting("model", "path") or "")), ("Steps", done)]
    times = [row["time"] for row in run.rows if isinstance(row.get("time"), int | float)]
    if times:
        facts.append(("From first to last step", duration(max(times) - min(times))))
        in_steps = sum(series(run.rows, "perf/step_seconds")[1])
        facts.append(("Time in training steps", duration(in_steps) if in_steps else ""))
        facts.append(("Last step", datetime.fromtimestamp(max(times)).astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return [(name, value) for name, value in facts if value]
