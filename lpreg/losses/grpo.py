"""GRPO: the PPO clip with group-relative advantages and a token-mean, no KL term (arXiv 2402.03300)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossInputs, LossOutput, PolicyLoss, check_range, mean_over


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSettings:
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low where the advantage is negative."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high where the advantage is positive."""

    def __post_init__(self) -> None:
        check_range("clip_low", self.clip_low, 0.0, 1.0)
        check_range("clip_high", self.clip_high, 0.0, math.inf)


class GRPO(PolicyLoss):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), averaged over tokens."""

    name = "grpo"
    Settings = GRPOSettings
    settings: GRPOSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        clipped = ratio.clamp(1 - self.settings.clip_low, 1 + self.settings.clip_high)
        free_loss, clipped_loss = -inputs.advantages * ratio, -inputs.advantages * clipped
        loss = token_mean(torch.maximum(free_loss, clipped_loss), counted, inputs.denominator)
        metrics = {
            "ratio": mean_over(ratio, counted),
            "clip_fraction": mean_over(clipped_loss > free_loss, counted),
        }
        return LossOutput(loss, metrics)
