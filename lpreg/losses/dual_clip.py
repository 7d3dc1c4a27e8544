"""Dual-clip PPO: bounds what a token of negative advantage can cost (Ye et al., arXiv 1912.09729)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, check_range
from lpreg.losses.ppo import PPOSettings, ppo_clip


@dataclass(frozen=True, slots=True, kw_only=True)
class DualClipSettings(PPOSettings):
    clip_dual: float = 10.0
    """The ratio counts up to this where the advantage is negative (c in the paper); above 1."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        check_range("clip_dual", self.clip_dual, 1.0, math.inf, open_low=True)


class DualClip(PolicyLoss):
    """The PPO clip, and -max(min(r A, clip(r) A), clip_dual A) where A < 0. Inert on-policy."""

    name = "dual_clip"
    Settings = DualClipSettings
    settings: DualClipSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted, advantages = inputs.ratio, inputs.counted, inputs.advantages
        losses, clipped = ppo_clip(ratio, advantages, self.settings)
        bound = -advantages * self.settings.clip_dual
        beyond = (advantages < 0) & (losses > bound)
        loss = token_mean(torch.where(beyond, bound, losses), counted, inputs.denominator)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of(clipped | beyond, counted),
            "dual_clip_fraction": Mean.of(beyond, counted),
        }
        return LossOutput(loss, metrics)
