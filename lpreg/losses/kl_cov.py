"""KL-Cov: a KL penalty on the tokens that drive entropy down (Cui et al., arXiv 2505.22617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings, NonNegative, Share, same_presets
from lpreg.needs import MethodNeeds, SelectionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class KLCovSettings(MethodSettings):
    """Which tokens are penalised, and how strongly."""

    share: Share = 2e-3
    """Share of all response tokens that is penalised, highest covariance of advantage and log-prob first. The default
    is that of the published code; another project's script for a 32B model has 2e-4."""
    beta: NonNegative = 1.0
    """Weight of the penalty."""

    @property
    def needs(self) -> MethodNeeds:
        rule = SelectionRule(kind="highest_covariance", fraction=self.share)
        return MethodNeeds(selection=rule, acts_without_advantage=True)


class KLCov(PolicyLoss):
    """-r A, plus beta * |log r| on the tokens of highest covariance; no clip, averaged over tokens.

    The covariance (A - mean A)(log p - mean log p) is ranked over the global batch, with old log-probs. On-policy the
    penalty is inert: log r is 0, and so is the gradient of its absolute value.
    """

    name = "kl_cov"
    Settings = KLCovSettings
    settings: KLCovSettings
    # The published scripts leave the share at their fork's default.
    presets: ClassVar = same_presets(share=2e-3, beta=1.0)

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
