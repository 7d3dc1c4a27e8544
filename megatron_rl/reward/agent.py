"""The reward of rollouts whose agent should have given one and did not."""

from __future__ import annotations

from megatron_rl.types import RewardResult, Sample


def no_reward(sample: Sample) -> RewardResult:
    """Returns score 0: the rollout reached a limit before the agent returned its reward, or the agent returns none."""
    detail = "truncated" if sample.response.finish_reason == "length" else "the agent returned no reward"
    return RewardResult(0.0, detail=detail)
