"""Outcomes of grading a batch: the rates of responses without a score, and when these are too many."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.config.reward import RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt, RewardResult

EXAMPLES = 3
EXCERPT = 200
"""Number of characters of a response's end that an example shows."""


def outcome_rates(results: Sequence[RewardResult]) -> dict[str, float]:
    """Fractions of responses that have no score, by the reason; zeros for an empty batch."""
    count = max(len(results), 1)
    return {
        f"reward/{outcome}_fraction": sum(result.outcome == outcome for result in results) / count
        for outcome in ("timeout", "error")
    }


def check_failures(graded: Sequence[tuple[Prompt, RewardResult]], settings: RewardSettings) -> None:
    """Raises UserError with examples if more than `max_failed_fraction` of the responses have no score: something is
    broken then, and what is left is no fair sample of the batch."""
    limit = settings.max_failed_fraction
    failed = [(prompt, result) for prompt, result in graded if not result.has_score]
    if len(failed) <= limit * len(graded):
        return
    seen: set[str] = set()
    lines = []
    for prompt, result in failed:
        if result.detail not in seen and len(seen) < EXAMPLES:
            seen.add(result.detail)
            lines.append(
                f"  {prompt.id}: {result.outcome}: {result.detail}\n"
                f"    label {str(prompt.label)[:EXCERPT]!r}, response ends in {result.text[-EXCERPT:]!r}"
            )
    raise UserError(
        f"{len(failed)} of {len(graded)} samples could not be graded by reward.name: {settings.name} and have no "
        f"reward; reward.max_failed_fraction is {limit:g}. Examples:\n" + "\n".join(lines)
    )
