"""SAPO: a soft gate on the ratio in place of a clip (arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lpreg._torch import torch
from lpreg.aggregation import sequence_mean_token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings, Positive, same_presets
from lpreg.needs import MethodNeeds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SAPOSettings(MethodSettings):
    """How sharply the gate closes."""

    tau_positive: Positive = 1.0
    """Sharpness for positive advantages."""
    tau_negative: Positive = 1.05
    """Sharpness for other advantages: larger, so that these gradients fade sooner."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(denominator_counts="sequences", token_separable=False)


class SAPO(PolicyLoss):
    """-A (4 / tau) sigmoid(tau (r - 1)), averaged over the tokens of each response, then over responses.

    The gradient is that of -r A times a weight that is 1 at r = 1 and fades on both sides. On-policy only the average
    over responses has an effect.
    """

    name = "sapo"
    Settings = SAPOSettings
    settings: SAPOSettings
    # SAPO is not in the table of Lp-Reg's paper; these are the values of its own.
    presets: ClassVar = same_presets(tau_positive=1.0, tau_negative=1.05)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        counted, advantages, ratio = inputs.counted, inputs.advantages, inputs.ratio
        tau = inputs.by_sign(self.settings.tau_positive, self.settings.tau_negative)
        gate = torch.sigmoid(tau * (ratio - 1))
        weight = 4 * gate.detach() * (1 - gate.detach())
        metrics = {"ratio": Mean.of(ratio, counted), "gate": Mean.of(weight, counted)}
        return LossOutput(self.aggregate(-advantages * 4 / tau * gate, inputs), metrics)

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        sequence_ids = self.need(inputs.sequence_ids, "sequence_ids")
        return sequence_mean_token_mean(token_losses, inputs.counted, sequence_ids, inputs.denominator)
