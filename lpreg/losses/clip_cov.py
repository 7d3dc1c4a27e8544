"""Clip-Cov: takes the gradient from a few random tokens of high covariance (Cui et al., arXiv 2505.22617)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, check_range
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.selection import SelectionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipCovSettings(PPOSettings):
    clip_low: float = 1.0
    """The ratio counts down to 1 - clip_low where the advantage is negative."""
    clip_high: float = 1.0
    """The ratio counts up to 1 + clip_high where the advantage is positive."""
    share: float = 2e-4
    """Of all response tokens, those that lose their gradient."""
    cov_low: float = 1.0
    """Only tokens with a covariance of advantage and log-prob above this are drawn."""
    cov_high: float = 5.0
    """Only tokens with a covariance of advantage and log-prob below this are drawn."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        check_range("share", self.share, 0.0, 1.0, open_low=True)
        check_range("cov_low", self.cov_low, -math.inf, math.inf)
        check_range("cov_high", self.cov_high, self.cov_low, math.inf, open_low=True)


class ClipCov(PolicyLoss):
    """The PPO clip without the selected tokens, averaged over all tokens: the selected ones still count as tokens.

    The covariance (A - mean A)(log p - mean log p) is of the global batch, with old log-probs, so a token that the
    PPO clip will stop later in the batch can be drawn too. Works on-policy; only the PPO clip is inert there.
    """

    name = "clip_cov"
    Settings = ClipCovSettings
    settings: ClipCovSettings

    @property
    def selection(self) -> SelectionRule:
        between = (self.settings.cov_low, self.settings.cov_high)
        return SelectionRule(kind="random_in_covariance", fraction=self.settings.share, covariance_range=between)

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
