"""Verifiers, and the pool of processes they run in."""

from megatron_rl.reward.pool import RewardPool, outcome_rates
from megatron_rl.reward.resolve import load_reward

__all__ = ["RewardPool", "load_reward", "outcome_rates"]
