"""VESPO: a smooth weight of a response's whole ratio (arXiv 2602.10693)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg.aggregation import sum_of_sequence, token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import MAX_LOG_RATIO, LossInputs
from lpreg.losses.settings import MethodSettings, NonNegative, same_presets
from lpreg.needs import MethodNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class VESPOSettings(MethodSettings):
    """The shape of the weight, by the sign of the advantage."""

    power_positive: NonNegative = 2.0
    """k for positive advantages: how fast the weight rises from w = 0."""
    decay_positive: NonNegative = 3.0
    """lambda for positive advantages: how fast the weight falls for large w."""
    power_negative: NonNegative = 3.0
    """k for other advantages."""
    decay_negative: NonNegative = 2.0
    """lambda for other advantages."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(token_separable=False)


class VESPO(PolicyLoss):
    """-stop(phi(w)) A log p, averaged over tokens, with w the product of a response's ratios.

    phi(w) = e^lambda w^k e^(-lambda w) is 1 at w = 1. On-policy the loss is the plain policy gradient. A response must
    not be split over micro-batches or ranks.
    """

    name = "vespo"
    Settings = VESPOSettings
    settings: VESPOSettings
    # VESPO is not in the table of Lp-Reg's paper; these are the values of its own.
    presets: ClassVar = same_presets(power_positive=2.0, decay_positive=3.0, power_negative=3.0, decay_negative=2.0)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        settings, counted = self.settings, inputs.counted
        bounded = inputs.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        log_w = sum_of_sequence(bounded, counted, self.need(inputs.sequence_ids, "sequence_ids"))
        log_w = log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        power = inputs.by_sign(settings.power_positive, settings.power_negative)
        decay = inputs.by_sign(settings.decay_positive, settings.decay_negative)
        weight = (power * log_w - decay * log_w.expm1()).exp()
        loss = token_mean(-weight * inputs.advantages * inputs.log_probs, counted, inputs.denominator)
        metrics = {"ratio": Mean.of(inputs.ratio, counted), "sequence_weight": Mean.of(weight, counted)}
        return LossOutput(loss, metrics)
