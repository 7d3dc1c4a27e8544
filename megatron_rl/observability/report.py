"""report.html: one file that shows a run in any browser, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_rl.errors import UserError
from megatron_rl.observability.charts import as_json, build_charts
from megatron_rl.observability.files import atomically
from megatron_rl.observability.format import duration, number
from megatron_rl.observability.metrics import Row, read_metrics, series
from megatron_rl.observability.summary import before_and_after, signed


def write_report(run_folder: Path) -> Path:
    """Write `run_folder/report.html` from its config.yaml and metrics.jsonl, and return its path.

    A run in progress, an interrupted one, and one with neither file all give a report of what there is.
    Errors: UserError when the folder does not exist, a file in it is broken, or the report cannot be written.
    """
    if not run_folder.is_dir():
        raise UserError(f"{run_folder}: no such run folder. Give the folder of a run, such as runs/<name>.")
    rows = read_metrics(run_folder)
    config_text, config = _read_config(run_folder / "config.yaml")
    charts = build_charts(rows)
    environment = Environment(
        loader=PackageLoader("megatron_rl.observability"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=_get(config, "run", "name") or run_folder.resolve().name,
        facts=_facts(rows, config),
        changes=before_and_after(rows),
        charts=charts,
        chart_data=[as_json(chart) for chart in charts],
        smoothed=any(line.smooth for chart in charts for line in chart.lines),
        config_text=config_text,
        number=number,
        signed=signed,
        plotly=Markup(get_plotlyjs()),
    )
    path = run_folder / "report.html"
    with atomically(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _read_config(path: Path) -> tuple[str, Any]:
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML, so there is no report: {error}") from error


def _facts(rows: Sequence[Row], config: Any) -> list[tuple[str, str]]:
    """The line under the title: what was trained, how far, how long and when."""
    algorithm = " ".join(str(_get(config, "algorithm", key) or "") for key in ("name", "preset")).strip()
    steps, total = max((row["step"] for row in rows), default=0), _get(config, "train", "steps")
    done = f"{steps} of {total}" if total is not None else str(steps)
    if isinstance(total, int) and steps < total:
        done += " (in progress or interrupted)"
    facts = [("Algorithm", algorithm), ("Model", str(_get(config, "model", "path") or "")), ("Steps", done)]
    times = [row["time"] for row in rows if isinstance(row.get("time"), int | float)]
    if times:
        facts.append(("From first to last step", duration(max(times) - min(times))))
        in_steps = sum(series(rows, "perf/step_seconds")[1])
        facts.append(("Time in training steps", duration(in_steps) if in_steps else ""))
        facts.append(("Last step", datetime.fromtimestamp(max(times)).astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return [(name, value) for name, value in facts if value]


def _get(config: Any, section: str, key: str) -> Any:
    """A value of the configuration; None where there is none, for a report must not depend on it."""
    values = config.get(section) if isinstance(config, dict) else None
    return values.get(key) if isinstance(values, dict) else None
