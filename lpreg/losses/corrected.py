"""Any method, corrected for the gap between the engine that sampled and the policy in training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lpreg.correction import accepted_sequences, masked_weights, truncated_weights
from lpreg.losses.base import LossOutput, Mean, PolicyLoss, WrappedLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings, NonNegative, check_range
from lpreg.needs import MethodNeeds

Weights = Literal["none", "truncated", "masked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionSettings(MethodSettings):
    """The correction, with w = p_actor / p_rollout of a token, both of the policy that generated the batch."""

    weights: Weights = "none"
    """The factor of the advantages: none; truncated: min(w, high) (`truncated_weights`); masked: w if it lies in
    [low, high], otherwise 0 (`masked_weights`)."""
    low: NonNegative = 0.5
    """Lowest w; masked only."""
    high: float = 2.0
    """Highest w."""
    reject_sequences: bool = False
    """Leaves out responses whose geometric mean of w lies outside [sequence_low, sequence_high]
    (`accepted_sequences`)."""
    sequence_low: NonNegative = 0.99
    """Lowest geometric mean."""
    sequence_high: float = 1.01
    """Highest geometric mean."""

    def __post_init__(self) -> None:
        MethodSettings.__post_init__(self)
        check_range("high", self.high, self.low if self.weights == "masked" else 0.0, open_low=True)
        if self.reject_sequences:
            check_range("sequence_high", self.sequence_high, self.sequence_low, open_low=True)

    def around(self, needs: MethodNeeds) -> MethodNeeds:
        """The needs of a method with this correction: rejecting a response looks at all of its tokens."""
        return replace(needs, token_separable=needs.token_separable and not self.reject_sequences)


class WithCorrection(WrappedLoss):
    """The method's loss with corrected advantages and without rejected responses, see `lpreg.correction`.

    Needs LossInputs.rollout_log_probs. A token with weight 0, or of a rejected response, still counts in the
    denominator of the mean.
    """

    name = "correction"
    Settings = CorrectionSettings
    settings: CorrectionSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        settings, metrics = self.settings, {}
        rollout = self.need(inputs.rollout_log_probs, "rollout_log_probs")
        actor = inputs.old_policy_log_probs
        counted = inputs.counted
        if settings.weights != "none":
            if settings.weights == "truncated":
                weights = truncated_weights(actor, rollout, high=settings.high)
            else:
                weights = masked_weights(actor, rollout, low=settings.low, high=settings.high)
            metrics["correction_weight"] = Mean.of(weights, counted)
            metrics["correction_bounded_fraction"] = Mean.of(weights != (actor - rollout).exp(), counted)
            inputs = replace(inputs, advantages=inputs.advantages * weights)
        if settings.reject_sequences:
            accepted = accepted_sequences(
                actor,
                rollout,
                self.need(inputs.sequence_ids, "sequence_ids"),
                low=settings.sequence_low,
                high=settings.sequence_high,
                mask=counted,
            )
            metrics["correction_rejected_fraction"] = Mean.of(~accepted, counted)
            inputs = replace(inputs, mask=counted & accepted)
        output = self.loss(inputs)
        return LossOutput(output.loss, output.metrics | metrics)


def with_correction(
    loss: PolicyLoss,
    *,
    weights: Weights = "none",
    low: float = 0.5,
    high: float = 2.0,
    reject_sequences: bool = False,
    sequence_low: float = 0.99,
    sequence_high: float = 1.01,
) -> PolicyLoss:
    """Returns the method `loss`, corrected for the gap between engine and actor, see `CorrectionSettings`.

    Raises:
        ValueError: bounds out of order, an unknown kind of weights.
    """
    settings = CorrectionSettings(
        weights=weights,
        low=low,
        high=high,
        reject_sequences=reject_sequences,
        sequence_low=sequence_low,
        sequence_high=sequence_high,
    )
    return WithCorrection(loss, settings)
