"""Advantages by an estimator of lpreg in TRL's trainer, from the rewards that TRL has computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lpreg import group_advantages
from lpreg.advantages import Estimator


def advantages_of(rewards: Tensor, weights: Tensor, generations: int, estimator: str | Estimator) -> Tensor:
    """Returns the advantages [N] of the responses of a generation on all ranks.

    A response without any reward has advantage 0, and no part in those of its group.

    rewards: [N, F] of each response and reward function, NaN where the function gave none; the responses to one prompt
        follow one another. weights: [F]. generations: responses per prompt.

    Raises:
        ValueError: what `group_advantages` refuses, such as a negative reward with "maxrl".
    """
    scored = ~rewards.isnan().all(1)
    total = (rewards * weights.to(rewards.device)).nansum(1)[scored]
    groups = torch.arange(len(rewards), device=rewards.device) // generations
    found = torch.zeros_like(rewards[:, 0])
    found[scored] = group_advantages(total, groups[scored], estimator=estimator).to(found.dtype)
    return found
