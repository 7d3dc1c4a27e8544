"""CISPO: clips the importance weight, never the gradient (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings
from lpreg.losses.settings import NonNegative, ShareOrZero, same_presets


@dataclass(frozen=True, slots=True, kw_only=True)
class CISPOSettings(PPOSettings):
    """Bounds of the importance weight."""

    clip_low: ShareOrZero = 1.0
    """The weight is at least 1 - clip_low."""
    clip_high: NonNegative = 4.0
    """The weight is at most 1 + clip_high; by default 5, as in ScaleRL (arXiv 2510.13786)."""


class CISPO(PolicyLoss):
    """-stop(clip(r, 1 - clip_low, 1 + clip_high)) A log p, averaged over tokens: every token keeps a gradient.

    On-policy the weight is 1, so the loss is the plain policy gradient.
    """

    name = "cispo"
    Settings = CISPOSettings
    # CISPO is not in the table of Lp-Reg's paper.
    presets: ClassVar = same_presets(clip_low=1.0, clip_high=4.0)
    settings: CISPOSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio.detach(), inputs.counted
        weight = ratio.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        loss = token_mean(-weight * inputs.advantages * inputs.log_probs, counted, inputs.denominator)
        metrics = {"ratio": Mean.of(ratio, counted), "clip_fraction": Mean.of(weight != ratio, counted)}
        return LossOutput(loss, metrics)
