"""Dual-clip PPO: bounds the loss of a token with negative advantage (Ye et al., arXiv 1912.09729)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import Range, same_presets


@dataclass(frozen=True, slots=True, kw_only=True)
class DualClipSettings(PPOSettings):
    """Bounds of the ratio."""

    clip_dual: Annotated[float, Range(1.0, open_low=True)] = 10.0
    """The ratio counts up to clip_dual if the advantage is negative (c in the paper)."""


class DualClip(PolicyLoss):
    """The PPO clip, and -max(min(r A, clip(r) A), clip_dual A) where A < 0. Both clips are inert on-policy."""

    name = "dual_clip"
    Settings = DualClipSettings
    settings: DualClipSettings
    # Dual-clip PPO is not in the table of Lp-Reg's paper.
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.2, clip_dual=10.0)

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
