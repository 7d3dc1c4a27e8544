"""The file of a suite's problems."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.errors import UserError
from megatron_rl.evaluation.problems import SCHEMA, problems_of, read_problems, write_problems
from megatron_rl.types import FinishReason, Prompt, Response, RewardResult, Sample


def sample(problem: int, reason: FinishReason = "stop") -> Sample:
    prompt = Prompt(f"suite:{problem}", (1,), "prompt", {"a": 1})
    return Sample(prompt, Response([5, 6, 7], [-1.0, 0.0, -1.0], reason, 0, sampled_mask=[True, False, True]))


def test_problems_are_read_as_they_were_written(tmp_path: Path) -> None:
    late = RewardResult(0.0, None, "took too long", "timeout", "late")
    results = [RewardResult(1.0, "34", "correct", text="text"), late, RewardResult(0.25)]
    problems = problems_of([sample(0), sample(0, "length"), sample(3)], results)
    assert [(problem.id, problem.right, problem.mean_score) for problem in problems] == [
        ("suite:0", 1, 1.0),
        ("suite:3", 0, 0.25),
    ]
    assert problems[0].responses[1].truncated and problems[0].responses[1].outcome == "timeout"
    assert [(response.text, response.tokens) for response in problems[0].responses] == [("text", 2), ("late", 2)]
    write_problems(tmp_path / "a" / "suite.parquet", problems)
    assert read_problems(tmp_path / "a" / "suite.parquet") == problems
    (first, _) = pq.read_table(tmp_path / "a" / "suite.parquet").to_pylist()
    assert [response["score"] for response in first["responses"]] == [1.0, None]


def test_a_problem_of_which_nothing_was_graded_has_no_score(tmp_path: Path) -> None:
    (problem,) = problems_of(
        [sample(0)] * 2, [RewardResult(1.0, outcome="error"), RewardResult(0.0, outcome="timeout")]
    )
    assert problem.mean_score is None and problem.right == 0 and problem.graded == []
    write_problems(tmp_path / "suite.parquet", [problem])
    (read,) = read_problems(tmp_path / "suite.parquet")
    assert read.mean_score is None and read.right == 0


def test_files_of_earlier_versions_have_a_score_of_0_for_failures(tmp_path: Path) -> None:
    problems = problems_of([sample(0)] * 2, [RewardResult(1.0), RewardResult(0.0, outcome="timeout")])
    write_problems(tmp_path / "suite.parquet", problems)
    rows = pq.read_table(tmp_path / "suite.parquet").to_pylist()
    rows[0]["responses"][1]["score"] = 0.0
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "suite.parquet")
    assert read_problems(tmp_path / "suite.parquet") == problems and problems[0].mean_score == 1.0


def test_a_sample_without_a_result_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        problems_of([sample(1)], [])


def test_a_damaged_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"is damaged .*: remove it"):
        read_problems(tmp_path / "x.parquet")
