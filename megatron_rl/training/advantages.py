"""Advantages of a step's responses, from their rewards. Legend: N responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import lpreg
from megatron_rl.batching.arrays import Array, Indices
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


def advantages_of(algorithm: AlgorithmSettings, rewards: Array, groups: Indices) -> Array:
    """Returns float64 [N], from rewards float64 [N] and the group [N] of each response.

    Raises UserError if the user's own estimator cannot be imported, fails, or returns something else.
    """
    name = algorithm.advantage
    own = own_function(name, "algorithm.advantage") if is_import_path(name) else None
    try:
        values = lpreg.group_advantages(
            torch.from_numpy(rewards), torch.from_numpy(groups), estimator=name if own is None else own
        )
    except ValueError as error:
        if own is None:
            raise
        raise UserError(f"algorithm.advantage={name!r}: {error}") from error
    return np.asarray(values, dtype=np.float64)
