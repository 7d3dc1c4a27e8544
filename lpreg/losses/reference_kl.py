"""A penalty for leaving a frozen reference policy, beside any method (GRPO as first published, arXiv 2402.03300)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, check_choice, check_range
from lpreg.losses.wrapped import WrappedLoss

Estimator = Literal["k1", "k3"]


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator = "k3") -> Tensor:
    """[T], KL(policy || reference) estimated on each sampled token, with a gradient of log_probs.

    - "k3": exp(d) - d - 1 with d = log ref - log p (Schulman, "Approximating KL Divergence", 2020): never negative. Its
      gradient is in expectation that of KL(reference || policy).
    - "k1": log p - log ref, with the gradient of half its square, which is in expectation that of KL(policy ||
      reference); its own gradient would be 0 in expectation.

    Expectations are over tokens of the policy itself: nothing is reweighted for tokens of an older one.
    """
    gap = reference_log_probs.detach() - log_probs
    if estimator == "k3":
        return gap.expm1() - gap
    half_square = gap.square() / 2
    return half_square + (-gap - half_square).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKLSettings:
    coefficient: float
    """Weight of the penalty."""
    estimator: Estimator = "k3"
    """As in `reference_kl`."""

    def __post_init__(self) -> None:
        check_range("coefficient", self.coefficient, 0.0, math.inf)
        check_choice("estimator", self.estimator, ("k1", "k3"))


class WithReferenceKL(WrappedLoss):
    """A method's loss + coefficient * KL(policy || reference), averaged over tokens as the method averages its own.

    `with_reference_kl(make_loss("grpo"), coefficient=1e-3)`. Needs LossInputs.reference_log_probs. Tokens of advantage
    0 have a gradient too, so none may be left out of the update.
    """

    name = "reference_kl"
    Settings = ReferenceKLSettings
    settings: ReferenceKLSettings

    @property
    def acts_without_advantage(self) -> bool:
        return True

    def __call__(self, inputs: LossInputs) -> LossOutput:
        reference = self.need(inputs.reference_log_probs, "reference_log_probs")
        # Where a token does not count its log-probs may be anything, and a gradient of inf * 0 is NaN.
        log_probs = torch.where(inputs.counted, inputs.log_probs, 0.0)
        kl = reference_kl(log_probs, torch.where(inputs.counted, reference, 0.0), self.settings.estimator)
        output = self.loss(inputs)
        penalty = self.settings.coefficient * self.aggregate(kl, inputs)
        return LossOutput(output.loss + penalty, output.metrics | {"reference_kl": Mean.of(kl, inputs.counted)})


def with_reference_kl(loss: PolicyLoss, *, coefficient: float, estimator: Estimator = "k3") -> PolicyLoss:
    """The method `loss` with a penalty for leaving a reference policy, see `WithReferenceKL`.

    Raises:
        ValueError: a negative coefficient, an unknown estimator.
    """
    return WithReferenceKL(loss, ReferenceKLSettings(coefficient=coefficient, estimator=estimator))
