from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_rl.observability.summary import before_and_after, print_summary, suite_metrics


def printed(folder: Path, width: int = 80) -> str:
    stream = io.StringIO()
    print_summary(Console(file=stream, width=width), folder)
    return stream.getvalue()


def test_every_suite_has_first_last_and_best_values(rows: list[dict[str, Any]]) -> None:
    changes = {(change.suite, change.label): change for change in before_and_after(rows)}
    assert len(changes) == 12
    accuracy = changes["held_out", "accuracy (avg@8)"]
    assert (accuracy.first, accuracy.first_step, accuracy.last_step) == (0.223, 0, 200)
    assert accuracy.last == pytest.approx(0.673)
    passed = changes["fresh", "pass@8"]
    assert (passed.best_step, passed.last_step) == (100, 200)
    assert changes["held_out", "entropy"].best is None, "entropy has no best value"
    assert changes["held_out", "entropy"].difference == pytest.approx(-0.1)


def test_a_single_evaluation_has_no_value_after_training(rows: list[dict[str, Any]]) -> None:
    for change in before_and_after(rows[:20]):
        assert (change.last, change.last_step, change.difference) == (None, None, None)


def test_probes_come_last_and_suites_may_have_slashes() -> None:
    rows = [{"step": 0, "eval/a/b/p_so": 0.1, "eval/a/b/pass@8": 0.5, "eval/a/b/avg@8": 0.2, "eval/a/b/entropy": 1.0}]
    assert suite_metrics(rows) == {"a/b": ["avg@8", "pass@8", "entropy", "p_so"]}


def test_the_summary_prints_the_table_and_existing_files_only(run_folder: Path) -> None:
    (run_folder / "checkpoints").mkdir()
    text = printed(run_folder)
    assert "Before and after (steps 0 and 200)" in text
    row = next(line for line in text.splitlines() if "held_out" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "held_out",
        "accuracy (avg@8)",
        "0.223",
        "0.673",
        "+0.450",
        "0.673 (step 200)",
    ]
    assert str(run_folder / "checkpoints") in text and str(run_folder / "metrics.jsonl") in text
    assert "report.html" not in text and "tensorboard" not in text.lower()


def test_a_path_is_never_broken_across_lines(run_folder: Path) -> None:
    assert str(run_folder / "config.yaml") in printed(run_folder, width=40)


def test_a_run_without_evaluations_has_no_table(tmp_path: Path) -> None:
    assert "Before and after" not in printed(tmp_path)
