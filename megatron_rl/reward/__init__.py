"""Verifiers, and their execution in a pool of processes that can be killed, or on a server."""

from megatron_rl.reward.grader import Grader, check_reward, open_grader
from megatron_rl.reward.outcomes import check_failures, outcome_rates
from megatron_rl.reward.pool import RewardPool
from megatron_rl.reward.resolve import load_reward
from megatron_rl.reward.trial import try_reward

__all__ = [
    "Grader",
    "RewardPool",
    "check_failures",
    "check_reward",
    "load_reward",
    "open_grader",
    "outcome_rates",
    "try_reward",
]
