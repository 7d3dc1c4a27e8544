"""The clipped policy term that most methods share (PPO, arXiv 1707.06347)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lpreg.losses.base import check_range


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low where the advantage is negative."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high where the advantage is positive."""

    def __post_init__(self) -> None:
        check_range("clip_low", self.clip_low, 0.0, 1.0)
        check_range("clip_high", self.clip_high, 0.0, math.inf)


def ppo_clip(ratio: Tensor, advantages: Tensor, settings: PPOSettings) -> tuple[Tensor, Tensor]:
    """([T] -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), [T] bool, where clipped); ratio and advantages [T]."""
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    free_loss, clipped_loss = -advantages * ratio, -advantages * clipped
    return torch.maximum(free_loss, clipped_loss), clipped_loss > free_loss
