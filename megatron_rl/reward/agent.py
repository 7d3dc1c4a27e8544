"""The reward of rollouts whose agent should have given one and did not."""

from __future__ import annotations

from megatron_rl.types import RewardResult, Sample


def no_reward(sample: Sample) -> RewardResult:
    """Returns score 0 for a rollout that reached a limit before its agent returned a reward. Any other rollout without
    one is an error of the agent."""
    if sample.response.finish_reason == "length":
        return RewardResult(0.0, detail="truncated")
    detail = "the agent returns no score: it must return one with reward.name=agent"
    return RewardResult(0.0, detail=detail, outcome="error")
