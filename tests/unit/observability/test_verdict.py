"""The verdict and the intervals against figures worked out by hand, and the figure of rare tokens."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev

import pytest

from megatron_rl.evaluation.problems import GradedResponse, Problem, write_problems
from megatron_rl.observability.report import write_report
from megatron_rl.observability.report.compare import charts_of
from megatron_rl.observability.report.intervals import difference, half_width, per_problem
from megatron_rl.observability.report.rarity import means, rarity_figure
from megatron_rl.observability.report.run_data import RunData, group_runs, read_run
from megatron_rl.observability.report.verdict import verdict


def problem(number: int, scores: list[float]) -> Problem:
    graded = [GradedResponse("text", None, score, "", "score", 3, False) for score in scores]
    return Problem(f"s:{number}", "prompt", "label", graded)


def run_with(folder: Path, name: str, evaluations: dict[int, list[list[float]]], seed: int = 0) -> RunData:
    """A run of method `name` with the scores of two responses per problem at some steps."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"run: {{name: {folder.name}}}\nseed: {seed}\nalgorithm: {{name: {name}}}\ntrain: {{steps: 10}}\n"
    )
    rows = []
    for step, scores in evaluations.items():
        problems = [problem(number, of_problem) for number, of_problem in enumerate(scores)]
        write_problems(folder / "evaluations" / f"step_{step:06d}" / "s.parquet", problems)
        avg = sum(p.mean_score for p in problems) / len(problems)
        solved = sum(p.right > 0 for p in problems) / len(problems)
        rows.append({"step": step, "time": 1.0 + step, "eval/s/avg@2": avg, "eval/s/pass@2": solved})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


BEFORE = [[0.0, 0.0], [0.0, 1.0]] * 10
AFTER = [[1.0, 1.0], [0.0, 1.0]] * 10
EQUAL = [[0.0, 1.0], [0.0, 0.0]] * 10
"""As good as BEFORE on average, but on other problems."""


def test_the_interval_is_that_of_the_mean_over_problems(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", "grpo", {0: BEFORE, 10: AFTER})
    assert half_width(run, "s", "avg@2", 0) == pytest.approx(1.96 * stdev([0.0, 0.5] * 10) / 20**0.5)
    assert half_width(run, "s", "pass@2", 10) == 0.0, "every problem is solved"
    assert half_width(run, "s", "maj@2", 0) is None and half_width(run, "s", "avg@2", 5) is None
    charts = {chart.title: chart for chart in charts_of(group_runs([run]))}
    avg, solved = charts["Accuracy and pass@k"].lines
    assert avg.error is not None and avg.error[0] == half_width(run, "s", "avg@2", 0)
    assert solved.error is not None and solved.error[1] == 0.0


def test_a_difference_is_paired_by_problem(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", "grpo", {0: BEFORE, 5: [[s + 0.2 for s in p] for p in BEFORE], 10: EQUAL})
    before, shifted, equal = (per_problem(run, "s", "avg@2", step) for step in (0, 5, 10))
    found = difference([shifted], [before])
    assert found is not None and found.value == pytest.approx(0.2) and found.half_width == pytest.approx(0.0, abs=1e-9)
    found = difference([equal], [before])
    assert found is not None and found.value == pytest.approx(0) and not found.is_clear
    assert found.half_width == pytest.approx(1.96 * stdev([0.5, -0.5] * 10) / 20**0.5)
    assert difference([None], [before]) is None


def test_seeds_widen_the_interval_of_a_difference() -> None:
    flat = {str(i): 0.5 for i in range(20)}
    above = [{name: value + shift for name, value in flat.items()} for shift in (0.1, 0.3)]
    below = [flat, flat]
    found = difference(above, below)
    assert found is not None and found.value == pytest.approx(0.2)
    assert found.half_width == pytest.approx(1.96 * stdev([0.1, 0.3]) / 2**0.5)


def test_the_verdict_of_one_run_follows_its_numbers(tmp_path: Path) -> None:
    up = verdict(group_runs([run_with(tmp_path / "up", "grpo", {0: BEFORE, 10: AFTER})]))
    assert up[0].startswith("Accuracy (avg@2) on s rose from 0.250 to 0.750 (+0.500, 95 % interval +0.")
    assert up[0].endswith("by step 10.")
    down = verdict(group_runs([run_with(tmp_path / "down", "grpo", {0: AFTER, 10: BEFORE})]))
    assert "fell from 0.750 to 0.250 (-0.500" in down[0]
    same = verdict(group_runs([run_with(tmp_path / "same", "grpo", {0: BEFORE, 10: EQUAL})]))
    assert "did not change measurably" in same[0]


def test_the_verdict_of_two_methods_says_which_is_better_and_what_the_interval_leaves_out(tmp_path: Path) -> None:
    one = run_with(tmp_path / "one", "grpo", {0: BEFORE, 10: BEFORE})
    other = run_with(tmp_path / "other", "lp_reg", {0: BEFORE, 10: AFTER})
    lines = verdict(group_runs([one, other]))
    assert lines[0].startswith("Accuracy (avg@2) on s at step 10: other has 0.750, one 0.250")
    assert "+0.500, a clear difference (95 % interval" in lines[0]
    assert "chance between seeds is not in them" in lines[-1]
    equal = run_with(tmp_path / "equal", "dppo", {0: BEFORE, 10: EQUAL})
    assert "no clear difference" in verdict(group_runs([one, equal]))[0]
    nothing = run_with(tmp_path / "nothing", "sapo", {0: BEFORE})
    assert "nothing can be said" in verdict(group_runs([one, nothing]))[0]


def test_the_verdict_stands_at_the_head_of_the_page(tmp_path: Path) -> None:
    run = run_with(tmp_path / "up", "grpo", {0: BEFORE, 10: AFTER})
    text = write_report(run.folder).read_text()
    assert text.index("on s rose from 0.250 to 0.750") < text.index("Before and after</h2>")
    assert "± 0." in text


def rare_rows(stopped: float) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in (1, 2, 3):
        row = {"step": step, "time": float(step), "reward/mean": 0.5}
        row |= {f"lpreg/rarity/{sign}/0.1/stopped": stopped for sign in ("negative", "positive")}
        if step < 3:
            row |= {"lpreg/rarity/negative/0/stopped": stopped + step, "lpreg/rarity/negative/0/weight": -1.0}
        rows.append(row)
    return rows


def test_the_figure_of_rare_tokens_has_a_line_per_run_and_panel_and_each_name_once(tmp_path: Path) -> None:
    runs = []
    for name, stopped in (("grpo", 0.2), ("dppo", 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(f"run: {{name: {name}}}\nalgorithm: {{name: {name}}}\n")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rare_rows(stopped)))
        runs.append(read_run(folder))
    assert means(runs[0].rows)["negative/0/stopped"] == pytest.approx(1.7), "a step without such tokens does not count"
    figure = rarity_figure(group_runs(runs))
    panels = {(trace["name"], trace["yaxis"]): trace for trace in figure.traces}
    assert set(panels) == {(name, axis) for name in ("grpo", "dppo") for axis in ("y", "y2", "y3")}
    assert panels["grpo", "y"]["y"][:3] == [1.7, None, 0.2] and panels["dppo", "y2"]["y"][2] == 0.0
    assert [trace["name"] for trace in figure.traces if trace["showlegend"]] == ["grpo", "dppo"]
    assert "Rare tokens</h2>" in write_report([run.folder for run in runs], tmp_path / "both.html").read_text()


def test_a_run_without_these_metrics_has_no_such_figure(run_folder: Path) -> None:
    assert not rarity_figure(group_runs([read_run(run_folder)])).traces


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([], []),
        ([{"step": 0, "eval/s/avg@2": 0.25}], ["Accuracy (avg@2) on s is 0.250 at step 0, the only evaluation."]),
        (
            [{"step": 1, "reward/mean": 0.5}],
            ["1 step of training, too few to state a trend. The training reward: 0.500."],
        ),
        (
            [{"step": step, "reward/mean": step / 10} for step in (1, 2, 3)],
            ["3 steps of training, too few to state a trend. The training reward: from 0.100 to 0.300."],
        ),
        ([{"step": 1, "train/loss": 0.5}], ["1 step of training: no reward has been logged."]),
    ],
)
def test_a_short_run_is_said_to_be_short(tmp_path: Path, rows: list[dict[str, float]], lines: list[str]) -> None:
    run = RunData(tmp_path, rows, "", {})
    assert verdict(group_runs([run])) == lines
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ("Nothing can be said yet" in write_report(tmp_path).read_text()) == (not lines)


def failing(folder: Path, name: str, seed: int, shares: list[float]) -> RunData:
    """A run in whose steps these shares of the samples timed out, and none ended in an error."""
    run = run_with(folder / f"{name}{seed}", name, {}, seed)
    rows = [
        {"step": step, "reward/mean": 0.5, "reward/timeout_fraction": share, "reward/error_fraction": 0.0}
        for step, share in enumerate(shares, 1)
    ]
    return RunData(run.folder, rows, run.config_text, run.config)


def test_samples_without_a_reward_are_told_of(tmp_path: Path) -> None:
    fine, bad = failing(tmp_path, "grpo", 0, [0.0, 0.0]), failing(tmp_path, "lp_reg", 0, [0.0, 0.25])
    words = "got no reward: a share of 0.125 timed out (mean over the steps, at most 0.250)."
    assert verdict(group_runs([bad]))[-1] == f"Some samples {words}"
    assert verdict(group_runs([fine, bad]))[-1] == f"Some samples of lp_reg0 {words}"
    assert not any("got no reward" in line for line in verdict(group_runs([fine])))


def test_the_chart_of_samples_without_a_reward_is_shown_if_there_are_any(tmp_path: Path) -> None:
    def lines(*runs: RunData) -> list[list[float]] | None:
        charts = {chart.title: chart for chart in charts_of(group_runs(runs))}
        chart = charts.get("Samples without a reward")
        return chart and [line.high or line.y for line in chart.lines]

    fine, bad = failing(tmp_path, "grpo", 0, [0.0, 0.0]), failing(tmp_path, "grpo", 1, [0.0, 0.25])
    assert lines(fine) is None
    assert lines(bad) == [[0.0, 0.25], [0.0, 0.0]]
    assert lines(fine, bad) == [[0.0, 0.25], [0.0, 0.0]], "seeds of one experiment share a band"
    other = failing(tmp_path, "lp_reg", 0, [0.0, 0.5])
    assert lines(fine, other) == [[0.0, 0.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0]]
