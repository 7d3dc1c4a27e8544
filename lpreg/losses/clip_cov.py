"""Clip-Cov: removes the gradient of a few random tokens of high covariance (Cui et al., arXiv 2505.22617)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import NonNegative, Share, ShareOrZero, check_range, same_presets
from lpreg.needs import MethodNeeds, SelectionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCovSettings(PPOSettings):
    """Bounds of the ratio, and which tokens lose their gradient."""

    clip_low: ShareOrZero = 1.0
    """The ratio counts down to 1 - clip_low if the advantage is negative."""
    clip_high: NonNegative = 1.0
    """The ratio counts up to 1 + clip_high if the advantage is positive."""
    share: Share = 2e-4
    """Share of all response tokens that loses its gradient."""
    cov_low: float = 1.0
    """Only tokens with a covariance of advantage and log-prob above this are drawn."""
    cov_high: float = 5.0
    """Only tokens with a covariance of advantage and log-prob below this are drawn."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        check_range("cov_high", self.cov_high, self.cov_low, math.inf, open_low=True)

    @property
    def needs(self) -> MethodNeeds:
        between = (self.cov_low, self.cov_high)
        return MethodNeeds(
            selection=SelectionRule(kind="random_in_covariance", fraction=self.share, covariance_range=between)
        )


class ClipCov(PolicyLoss):
    """The PPO clip without the selected tokens, averaged over all tokens: the selected ones still count as tokens.

    The covariance (A - mean A)(log p - mean log p) is taken over the global batch, with old log-probs, so a token that
    the PPO clip will stop later in the batch can be drawn too. On-policy only the PPO clip is inert.
    """

    name = "clip_cov"
    Settings = ClipCovSettings
    settings: ClipCovSettings
    presets: ClassVar = same_presets(clip_low=1.0, clip_high=1.0, share=2e-4, cov_low=1.0, cov_high=5.0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        detached = self.need(inputs.selection, "selection") & counted
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of(clipped, counted),
            "selected_fraction": Mean.of(detached, counted),
        }
        return LossOutput(token_mean(losses, counted & ~detached, inputs.denominator), metrics)
