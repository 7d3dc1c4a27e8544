"""A penalty for leaving a frozen reference policy, beside any method (GRPO as first published, arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lpreg.losses.base import LossOutput, Mean, PolicyLoss, WrappedLoss
from lpreg.losses.inputs import MAX_LOG_RATIO, LossInputs
from lpreg.losses.settings import MethodSettings, NonNegative
from lpreg.needs import MethodNeeds

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["k1", "k3"]


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator = "k3") -> Tensor:
    """[T], KL(policy || reference) estimated on each sampled token, with a gradient of log_probs.

    - "k3": exp(d) - d - 1 with d = log ref - log p (Schulman, "Approximating KL Divergence", 2020): never negative. Its
      gradient is in expectation that of KL(reference || policy); d counts up to 20 in size, with no gradient beyond.
    - "k1": log p - log ref, with the gradient of half its square, which is in expectation that of KL(policy ||
      reference); the gradient of k1 itself would be 0 in expectation.

    Expectations are over tokens sampled from the policy itself: tokens of an older policy are not reweighted.
    """
    gap = reference_log_probs.detach() - log_probs
    if estimator == "k3":
        gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return gap.expm1() - gap
    half_square = gap.square() / 2
    return half_square + (-gap - half_square).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKLSettings(MethodSettings):
    """Weight and estimator of the penalty."""

    coefficient: NonNegative
    """Weight of the penalty."""
    estimator: Estimator = "k3"
    """k1 or k3, see `reference_kl`."""

    def around(self, needs: MethodNeeds) -> MethodNeeds:
        """The needs of a method with this penalty: tokens with advantage 0 have a gradient too."""
        return replace(needs, acts_without_advantage=True)


class WithReferenceKL(WrappedLoss):
    """A method's loss + coefficient * KL(policy || reference), averaged over tokens as the method averages its own.

    `with_reference_kl(make_loss("grpo"), coefficient=1e-3)`. Needs LossInputs.reference_log_probs. Tokens with
    advantage 0 have a gradient too, so no token may be left out of the update.
    """

    name = "reference_kl"
    Settings = ReferenceKLSettings
    settings: ReferenceKLSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        reference = self.need(inputs.reference_log_probs, "reference_log_probs")
        kl = reference_kl(inputs.log_probs, reference, self.settings.estimator)
        output = self.loss(inputs)
        penalty = self.settings.coefficient * self.aggregate(kl, inputs)
        return LossOutput(output.loss + penalty, output.metrics | {"reference_kl": Mean.of(kl, inputs.counted)})


def with_reference_kl(loss: PolicyLoss, *, coefficient: float, estimator: Estimator = "k3") -> PolicyLoss:
    """Returns the method `loss` with a penalty for leaving a reference policy, see `WithReferenceKL`.

    Raises:
        ValueError: a negative coefficient, an unknown estimator.
    """
    return WithReferenceKL(loss, ReferenceKLSettings(coefficient=coefficient, estimator=estimator))
