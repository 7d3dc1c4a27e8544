"""KL-Cov: holds back the tokens that drive entropy down, by a KL penalty (Cui et al., arXiv 2505.22617)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, check_range
from lpreg.selection import SelectionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class KLCovSettings:
    share: float = 2e-4
    """Of all response tokens, highest covariance of advantage and log-prob first, that are penalised."""
    beta: float = 1.0
    """Weight of the penalty."""

    def __post_init__(self) -> None:
        check_range("share", self.share, 0.0, 1.0, open_low=True)
        check_range("beta", self.beta, 0.0, math.inf)


class KLCov(PolicyLoss):
    """-r A, plus beta * |log r| on the tokens of highest covariance; no clip, averaged over tokens.

    The covariance (A - mean A)(log p - mean log p) is ranked over the global batch, with old log-probs. Inert
    on-policy, where log r is 0 and so is the gradient of its size.
    """

    name = "kl_cov"
    Settings = KLCovSettings
    settings: KLCovSettings

    @property
    def selection(self) -> SelectionRule:
        return SelectionRule(kind="highest_covariance", fraction=self.settings.share)

    @property
    def acts_without_advantage(self) -> bool:
        return True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        penalised = self.need(inputs.selection, "selection") & counted
        penalty = inputs.log_ratio.abs()
        losses = -inputs.advantages * ratio + self.settings.beta * torch.where(penalised, penalty, 0.0)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "selected_fraction": Mean.of(penalised, counted),
            "abs_log_ratio": Mean.of(penalty, penalised),
        }
        return LossOutput(token_mean(losses, counted, inputs.denominator), metrics)
