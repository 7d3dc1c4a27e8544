"""The clipped policy term that most methods share (PPO, arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lpreg._torch import torch
from lpreg.losses.settings import MethodSettings, NonNegative, ShareOrZero

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings(MethodSettings):
    """Bounds of the ratio."""

    clip_low: ShareOrZero = 0.2
    """The ratio counts down to 1 - clip_low if the advantage is negative."""
    clip_high: NonNegative = 0.2
    """The ratio counts up to 1 + clip_high if the advantage is positive."""


def ppo_clip(ratio: Tensor, advantages: Tensor, settings: PPOSettings) -> tuple[Tensor, Tensor]:
    """Returns -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) [T] and where it is clipped, [T] bool; ratio r and
    advantages A are [T]."""
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    free_loss, clipped_loss = -advantages * ratio, -advantages * clipped
    return torch.maximum(free_loss, clipped_loss), clipped_loss > free_loss
