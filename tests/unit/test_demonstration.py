"""The demonstration's words follow its numbers, and its view shows both runs at any time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.quickstart import demonstration
from examples.quickstart.comparison import METHODS, conclusion, outcomes
from examples.quickstart.progress import Progress, Watched
from megatron_rl.config import load_config
from megatron_rl.evaluation.problems import GradedResponse, Problem, write_problems


def problem(index: int, right: int) -> Problem:
    responses = [GradedResponse("", None, float(i < right), "", "score", 11, False) for i in range(8)]
    return Problem(f"{index:03d}", "", "", responses)


def finished_run(folder: Path, right: list[int], wait: float) -> Path:
    """Writes what a run of two evaluations leaves: all problems half solved before, `right` of eight after."""
    problems = {0: [problem(i, 4) for i in range(len(right))], 50: [problem(i, r) for i, r in enumerate(right)]}
    rows: list[dict[str, Any]] = []
    for step, found in problems.items():
        write_problems(folder / "evaluations" / f"step_{step:06d}" / "fresh.parquet", found)
        accuracy = sum(each.mean_score for each in found) / len(found)
        passed = sum(each.right > 0 for each in found) / len(found)
        values = {"avg@8": accuracy, "pass@8": passed, "entropy": 0.2, "p_wait_after_no": wait if step else 0.03}
        rows.append({"step": step} | {f"eval/fresh/{name}": value for name, value in values.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def said(tmp_path: Path, grpo: list[int], lp_reg: list[int]) -> str:
    folders = {
        "grpo": finished_run(tmp_path / "grpo", grpo, wait=0.001),
        "lp_reg": finished_run(tmp_path / "lp_reg", lp_reg, wait=0.8),
    }
    return conclusion(outcomes(folders), len(grpo))


def test_the_conclusion_names_what_improved_by_how_much_and_how_certainly(tmp_path: Path) -> None:
    words = said(tmp_path, grpo=[0] * 20 + [6] * 20, lp_reg=[6] * 40)
    accuracy = (
        "Lp-Reg is ahead of GRPO in accuracy (0.750 against 0.375, a difference of +0.375 with a 95 % interval of +0.2"
    )
    assert f"On 40 fresh problems, {accuracy}" in words
    assert "Lp-Reg is ahead of GRPO in pass@8 (1.000 against 0.500" in words
    assert "From 1.000 before training, pass@8 fell to 0.500 with GRPO and did not move with Lp-Reg." in words
    assert "`wait` after a failed attempt fell to 0.001 with GRPO and rose to 0.800 with Lp-Reg." in words


def test_the_conclusion_says_so_if_lp_reg_is_behind(tmp_path: Path) -> None:
    words = said(tmp_path, grpo=[6] * 40, lp_reg=[0] * 20 + [6] * 20)
    assert "Lp-Reg is behind GRPO in accuracy (0.375 against 0.750, a difference of -0.375" in words
    assert "ahead" not in words


def test_a_difference_within_its_interval_is_called_unclear(tmp_path: Path) -> None:
    words = said(tmp_path, grpo=[2, 6] * 20, lp_reg=[6, 2] * 20)
    interval = r"a difference of \+0\.000 with a 95 % interval of -0\.\d+ to \+0\.\d+"
    assert re.search(rf"there is no clear difference in accuracy \(0\.500 against 0\.500, {interval}\)", words)
    assert "ahead" not in words and "behind" not in words


def test_the_difference_is_paired_by_problem(tmp_path: Path) -> None:
    """Problems of very different difficulty do not widen the interval."""
    folders = {
        "grpo": finished_run(tmp_path / "grpo", [0, 7] * 20, wait=0.1),
        "lp_reg": finished_run(tmp_path / "lp_reg", [1, 8] * 20, wait=0.1),
    }
    accuracy = outcomes(folders)[0]
    assert accuracy.difference
    assert accuracy.difference.low == accuracy.difference.high == pytest.approx(1 / 8)


def watched(tmp_path: Path) -> list[Watched]:
    runs = list(demonstration.watched(tmp_path, 50).values())
    for run in runs:
        run.folder.mkdir()
        run.output.write_text("first\nwarm_start=20/900 loss=2.1 left=2min\n\n")
    return runs


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_view_shows_both_runs_before_and_after_their_first_step(tmp_path: Path, width: int) -> None:
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    progress = Progress(watched(tmp_path), console)
    console.print(progress.render())
    finished_run(tmp_path / "grpo", [8, 8], wait=0.5)
    progress.update()
    console.print(progress.render())
    assert isinstance(console.file, StringIO)
    before, after = console.file.getvalue().split("╰", 1)
    assert "GRPO 0/50" in before and "Lp-Reg 0/50" in before and "warm_start" in before
    assert "GRPO 50/50" in after and "Lp-Reg 0/50" in after and "1.000" in after
    assert all(len(line) <= width for line in (before + after).splitlines())


def test_without_a_terminal_the_view_prints_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(watched(tmp_path), Console(file=StringIO())) as progress:
        progress.update()
    printed = capsys.readouterr().out
    assert "GRPO: warm_start=20/900 loss=2.1 left=2min | Lp-Reg: warm_start" in printed
    assert "\x1b" not in printed


def test_both_runs_have_the_same_settings_but_for_the_method() -> None:
    configs = [load_config(demonstration.CONFIG, [f"algorithm.name={m}", "run.name=x"]).model_dump() for m in METHODS]
    for config in configs:
        del config["algorithm"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [("algorithm.name=gspo", "the demonstration sets this itself"), ("train.stepz=3", "train.steps")],
)
def test_wrong_overrides_are_refused_before_anything_starts(
    override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demonstration.main([override]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def program(code: str) -> Any:
    """Returns a stand-in for `start` that runs a line of Python in place of each training."""

    def start(method: str, run: Watched, overrides: list[str]) -> subprocess.Popen[bytes]:
        run.output.parent.mkdir(parents=True, exist_ok=True)
        with run.output.open("wb") as output:
            command = [sys.executable, "-c", f"method = {method!r}\n{code}"]
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    return start


def test_if_one_run_fails_the_other_is_stopped_and_the_reason_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys, time\nif method == 'grpo': sys.exit('error: no memory')\ntime.sleep(10_000)"
    monkeypatch.setattr(demonstration, "start", program(code))
    runs = demonstration.watched(tmp_path / "both", 50)
    assert demonstration.train(runs, [], Progress(list(runs.values()), Console(file=StringIO()))) == 1
    assert "GRPO failed:\nerror: no memory" in capsys.readouterr().err


def test_an_interrupt_waits_for_both_runs_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstration, "start", program("import time\ntime.sleep(0.2)\nprint('checkpoint written')"))
    monkeypatch.setattr(demonstration.time, "sleep", interrupted)
    runs = demonstration.watched(tmp_path / "both", 50)
    assert demonstration.train(runs, [], Progress(list(runs.values()), Console(file=StringIO()))) == 130
    assert all(run.last_line == "checkpoint written" for run in runs.values())
    assert "stopping both runs" in capsys.readouterr().out
