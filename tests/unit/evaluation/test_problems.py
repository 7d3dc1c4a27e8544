"""Per-problem results, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.evaluation.problems import problems_of, read_problems, write_problems
from megatron_rl.types import Generation, Prompt, RewardResult, Sample


def sample(group: int, reward: RewardResult | None, reason: str = "stop") -> Sample:
    prompt = Prompt(f"suite:{group}", (1,), "prompt", {"a": 1})
    return Sample(prompt, group, Generation([5, 6], [-1.0, -1.0], reason, 0), "text", reward)  # type: ignore[arg-type]


def test_there_and_back(tmp_path: Path) -> None:
    late = RewardResult(0.0, None, "took too long", "timeout")
    samples = [sample(0, RewardResult(1.0, "34", "correct")), sample(0, late, "length"), sample(3, RewardResult(0.25))]
    problems = problems_of(samples)
    assert [(problem.id, problem.right, problem.mean_score) for problem in problems] == [
        ("suite:0", 1, 0.5),
        ("suite:3", 0, 0.25),
    ]
    assert problems[0].responses[1].truncated and problems[0].responses[1].outcome == "timeout"
    write_problems(tmp_path / "a" / "suite.parquet", problems)
    assert read_problems(tmp_path / "a" / "suite.parquet") == problems


def test_a_sample_without_a_grade_is_refused() -> None:
    with pytest.raises(ValueError, match="suite:1 was not graded"):
        problems_of([sample(1, None)])


def test_a_damaged_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        read_problems(tmp_path / "x.parquet")
