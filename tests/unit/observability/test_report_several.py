"""Tests of a report of several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.observability.report import write_report
from megatron_rl.observability.report.compare import charts_of
from megatron_rl.observability.report.configuration import differences
from megatron_rl.observability.report.run_data import RunData, group_runs, read_run


@pytest.fixture
def runs(tmp_path: Path, rows: list[dict[str, Any]]) -> list[RunData]:
    """Two seeds of one method, and a half-finished run of another method."""
    read = []
    for name, seed, algorithm, shift, steps in (("lp-0", 0, "lp_reg", 0.0, 200), ("lp-1", 1, "lp_reg", 0.1, 200),
                                                 ("grpo-0", 0, "grpo", -0.1, 100)):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(
            f"run: {{name: {name}}}\nseed: {seed}\nalgorithm: {{name: {algorithm}}}\ntrain: {{steps: 200}}\n"
        )
        own = [row | ({"reward/mean": row["reward/mean"] + shift} if row["step"] else {}) for row in rows[: steps + 1]]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
        read.append(read_run(folder))
    return read


def test_runs_that_differ_in_their_seed_form_a_group(runs: list[RunData]) -> None:
    groups = group_runs(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("lp (2 seeds)", 2), ("grpo-0", 1)]


def test_groups_of_the_same_name_get_different_labels(runs: list[RunData], tmp_path: Path) -> None:
    (runs[2].folder / "config.yaml").write_text("run: {name: lp-0}\nalgorithm: {name: grpo}\n")
    groups = group_runs([runs[0], read_run(runs[2].folder)])
    assert len({group.label for group in groups}) == 2


def test_a_band_spans_the_seeds_around_their_mean(runs: list[RunData]) -> None:
    reward = charts_of(group_runs(runs))[0]
    lp, grpo = reward.lines
    assert (lp.name, grpo.name, lp.color, grpo.color) == ("lp (2 seeds)", "grpo-0", 0, 1)
    assert lp.low is not None and lp.high is not None and grpo.low is None
    assert [high - low for low, high in zip(lp.low, lp.high, strict=True)] == pytest.approx([0.1] * 200)
    assert [2 * y - low for y, low in zip(lp.y, lp.low, strict=True)] == pytest.approx(lp.high)
    assert len(grpo.x) == 100, "a run in progress is drawn up to its last step"


def test_phases_of_several_runs_are_drawn_as_bars(runs: list[RunData]) -> None:
    (chart,) = [chart for chart in charts_of(group_runs(runs)) if chart.title == "Seconds per phase"]
    assert chart.bars and not chart.stacked
    reward = next(line for line in chart.lines if line.name == "reward")
    assert reward.x == ["lp (2 seeds)", "grpo-0"] and reward.y == pytest.approx([0.03, 0.03])


def test_only_settings_that_differ_are_listed(runs: list[RunData]) -> None:
    assert differences(runs) == [("seed", ["0", "1", "0"]), ("algorithm.name", ["lp_reg", "lp_reg", "grpo"])]


def test_several_runs_share_one_page(runs: list[RunData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_report([run.folder for run in runs]) == Path("report.html")
    text = Path("report.html").read_text()
    assert "lp (2 seeds) and grpo-0" in text and "Settings that differ" in text
    assert write_report([run.folder for run in runs], tmp_path / "out" / "x.html") == tmp_path / "out" / "x.html"
    assert not (runs[0].folder / "report.html").exists()


def test_colours_stand_for_runs_and_dashes_for_kinds_with_a_chart_per_suite(runs: list[RunData]) -> None:
    charts = {chart.title: chart for chart in charts_of(group_runs(runs))}
    assert "Accuracy and pass@k" not in charts, "a chart of two suites would need dashes for the suites too"
    chart = charts["Accuracy and pass@k: fresh"]
    assert {(line.name, line.color, line.kind, line.dash) for line in chart.lines} == {
        (name, color, kind, dash)
        for color, name in enumerate(("lp (2 seeds)", "grpo-0"))
        for kind, dash in (("avg@8", "solid"), ("pass@8", "dash"))
    }
    assert "Solid: share of correct answers" in chart.words and "Dashed: share of problems" in chart.words
    entropy = charts["Entropy: fresh"]
    assert {line.dash for line in entropy.lines} == {"dash"}
    assert "Dashed: evaluation" in entropy.words and "Dotted" not in entropy.words and "Solid" not in entropy.words
