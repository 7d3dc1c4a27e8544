"""What became of a batch: the rates of samples without a score, and when they are too many."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.errors import UserError
from megatron_rl.types import RewardResult, Sample

EXAMPLES = 3
EXCERPT = 200
"""Characters of a response's end that an example shows."""


def outcome_rates(results: Sequence[RewardResult]) -> dict[str, float]:
    """The fractions of samples whose verifier timed out or failed; zeros for no samples."""
    count = max(len(results), 1)
    return {
        f"reward/{outcome}_fraction": sum(result.outcome == outcome for result in results) / count
        for outcome in ("timeout", "error")
    }


def check_failures(samples: Sequence[Sample], results: Sequence[RewardResult], limit: float) -> None:
    """UserError with examples where more than `limit` of the samples have no score: such a batch teaches falsehoods."""
    failed = [(s, r) for s, r in zip(samples, results, strict=True) if r.outcome != "score"]
    if len(failed) <= limit * len(results):
        return
    seen: set[str] = set()
    lines = []
    for sample, result in failed:
        if result.detail not in seen and len(seen) < EXAMPLES:
            seen.add(result.detail)
            lines.append(
                f"  {sample.prompt.id}: {result.outcome}: {result.detail}\n"
                f"    label {str(sample.prompt.label)[:EXCERPT]!r}, response ends in {sample.text[-EXCERPT:]!r}"
            )
    raise UserError(
        f"{len(failed)} of {len(results)} samples could not be graded and would count as wrong; "
        f"reward.max_failed_fraction is {limit:g}. Examples:\n" + "\n".join(lines)
    )
