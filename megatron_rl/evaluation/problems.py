"""The problems of an evaluation with their graded responses, as parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import UserError
from megatron_rl.types import Outcome, RewardResult, Sample
from megatron_rl.utils.bounded import open_plain
from megatron_rl.utils.files import atomically
from megatron_rl.utils.parquet import check_whole

RIGHT = 0.5
"""A response with a higher score counts as right in pass@k and maj@k."""

RESPONSE = pa.struct(
    [
        ("text", pa.string()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("detail", pa.string()),
        ("outcome", pa.string()),
        ("tokens", pa.int64()),
        ("truncated", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("label", pa.string()),
        ("mean_score", pa.float64()),
        ("right", pa.int64()),
        ("responses", pa.list_(RESPONSE)),
    ]
)


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """One graded response."""

    text: str
    answer: str | None
    score: float
    detail: str
    outcome: Outcome
    """If it is not "score", the response has no reward: `score` means nothing, and is null in files."""
    tokens: int
    truncated: bool
    """Whether the response reached the maximum length without an end."""

    @property
    def has_score(self) -> bool:
        return self.outcome == "score"

    @property
    def right(self) -> bool:
        return self.has_score and self.score > RIGHT


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its responses."""

    id: str
    prompt: str
    label: str
    responses: list[GradedResponse]

    @property
    def graded(self) -> list[GradedResponse]:
        """The responses that have a score."""
        return [response for response in self.responses if response.has_score]

    @property
    def mean_score(self) -> float | None:
        """Mean score of the graded responses; None if there are none."""
        scores = [response.score for response in self.graded]
        return sum(scores) / len(scores) if scores else None

    @property
    def right(self) -> int:
        """Number of right responses."""
        return sum(response.right for response in self.responses)


def problems_of(samples: Sequence[Sample], results: Sequence[RewardResult]) -> list[Problem]:
    """Groups graded samples by their prompts, in order. Raises ValueError unless there is one result per sample."""
    found: dict[str, Problem] = {}
    for sample, reward in zip(samples, results, strict=True):
        prompt = sample.prompt
        problem = found.setdefault(prompt.id, Problem(prompt.id, prompt.text, str(prompt.label), []))
        problem.responses.append(
            GradedResponse(
                text=reward.text,
                answer=reward.answer,
                score=reward.score,
                detail=reward.detail,
                outcome=reward.outcome,
                tokens=sample.response.num_sampled_tokens,
                truncated=sample.response.finish_reason == "length",
            )
        )
    return list(found.values())


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Writes one row per problem. The file appears complete or not at all. Raises UserError if it cannot be written."""
    rows: list[dict[str, Any]] = [
        asdict(problem) | {"mean_score": problem.mean_score, "right": problem.right} for problem in problems
    ]
    for response in (response for row in rows for response in row["responses"] if response["outcome"] != "score"):
        response["score"] = None
    with atomically(path) as partial:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def read_problems(path: Path) -> list[Problem]:
    """Reads a file of `write_problems`. Raises UserError for anything else."""
    try:
        with open_plain(path):
            check_whole(path)
        rows = pq.read_table(path, schema=SCHEMA, page_checksum_verification=True).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and its problems are evaluated again") from error
    return [
        Problem(
            row["id"],
            row["prompt"],
            row["label"],
            [GradedResponse(**response | {"score": response["score"] or 0.0}) for response in row["responses"]],
        )
        for row in rows
    ]
