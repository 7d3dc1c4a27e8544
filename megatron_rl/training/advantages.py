"""Advantages of a step's responses, from their rewards. Legend: N responses.

The reward of a response is NaN if its generation or its grading failed. Such a response has no part in any mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import lpreg
from megatron_rl.batching.arrays import Array, Indices, Mask
from megatron_rl.errors import UserError
from megatron_rl.utils.import_path import is_import_path, own_function

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


def counted_responses(rewards: Array, groups: Indices) -> Mask:
    """Returns [N], True for the responses that a step learns from: they have a reward, and so has another response to
    the same prompt, unless the group has only one response by configuration.

    rewards: [N], NaN without a reward. groups: [N], the group of each response.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rewarded = ~np.isnan(rewards)
    counts = np.bincount(group[rewarded], minlength=len(sizes))
    return np.asarray(rewarded & (counts >= np.minimum(2, sizes))[group])


def advantages_of(algorithm: AlgorithmSettings, rewards: Array, groups: Indices) -> Array:
    """Returns float64 [N], 0 for responses that are not counted, from rewards float64 [N] and the group [N] of each
    response. The estimator gets the counted responses only.

    Raises UserError for rewards that the estimator does not take, and if the user's own estimator cannot be imported,
    fails, or returns something else.
    """
    name, rows = algorithm.advantage, np.flatnonzero(counted_responses(rewards, groups))
    own = own_function(name, "algorithm.advantage") if is_import_path(name) else None
    advantages = np.zeros(len(rewards))
    if not len(rows):
        return advantages
    try:
        advantages[rows] = lpreg.group_advantages(
            torch.from_numpy(rewards[rows]), torch.from_numpy(groups[rows]), estimator=name if own is None else own
        )
    except ValueError as error:
        raise UserError(f"algorithm.advantage={name!r}: {error}") from error
    return advantages
