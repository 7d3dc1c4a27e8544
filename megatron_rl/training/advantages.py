"""Advantages of a step's responses, from their rewards. Legend: N responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import lpreg
from megatron_rl.batching.arrays import Array, Indices

if TYPE_CHECKING:
    from megatron_rl.config import Config
    from megatron_rl.config.algorithm import AlgorithmSettings


def overlong_penalty(config: Config, lengths: Indices) -> Array:
    """Returns what to add to the rewards [N] of responses with this many sampled tokens [N] (DAPO)."""
    settings = config.algorithm.overlong
    penalty = lpreg.overlong_penalty(
        torch.from_numpy(lengths), max_length=config.rollout.max_response_tokens, buffer=settings.buffer_tokens
    )
    return np.asarray(settings.penalty * penalty)


def advantages_of(algorithm: AlgorithmSettings, rewards: Array, groups: Indices) -> Array:
    """Returns float64 [N], from rewards float64 [N] and the group [N] of each response."""
    values = lpreg.group_advantages(torch.from_numpy(rewards), torch.from_numpy(groups), estimator=algorithm.advantage)
    return np.asarray(values, dtype=np.float64)
