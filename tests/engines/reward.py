"""A verifier that an untrained model learns to satisfy at once."""

from __future__ import annotations

from megatron_rl.types import RewardResult, Sample


def odd(sample: Sample) -> RewardResult:
    """Half of all possible responses are right."""
    return RewardResult(float(sum(sample.response.token_ids.tolist()) % 2))
