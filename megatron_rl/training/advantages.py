"""From a step's rewards to advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import lpreg
from megatron_rl.batching.sequences import Array
from megatron_rl.errors import UserError
from megatron_rl.utils.import_path import import_object, is_import_path

if TYPE_CHECKING:
    from megatron_rl.config import Config
    from megatron_rl.rollout.collector import Rollouts


def advantages_of(config: Config, rollouts: Rollouts) -> tuple[Array, dict[str, float]]:
    """[N] fp64, of the samples to train on, and metrics. Rewards that ran on for too long are lowered first."""
    algorithm, samples = config.algorithm, rollouts.samples
    rewards, metrics = torch.from_numpy(rollouts.sample_rewards), {}
    if algorithm.overlong.buffer_tokens:
        lengths = torch.tensor([len(sample.generation.token_ids) for sample in samples])
        penalty = algorithm.overlong.penalty * lpreg.overlong_penalty(
            lengths, max_length=config.rollout.max_response_tokens, buffer=algorithm.overlong.buffer_tokens
        )
        rewards, metrics = rewards + penalty, {"reward/overlong_penalty": float(penalty.mean())}
    groups = torch.tensor([sample.group for sample in samples])
    if not is_import_path(algorithm.advantage):
        return np.asarray(lpreg.group_advantages(rewards, groups, estimator=algorithm.advantage)), metrics
    own = import_object(algorithm.advantage, "algorithm.advantage")
    try:
        return np.asarray(lpreg.group_advantages(rewards, groups, estimator=own)), metrics
    except ValueError as error:
        raise UserError(f"algorithm.advantage={algorithm.advantage!r}: {error}") from error
