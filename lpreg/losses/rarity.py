"""Metrics of what a method does to rare tokens, the same for every method."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lpreg._torch import torch
from lpreg.losses.base import LossOutput, Mean, PolicyLoss, WrappedLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings
from lpreg.needs import MethodNeeds

if TYPE_CHECKING:
    from torch import Tensor

EDGES = (0.0, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bounds of the old policy's probability of a token, between which means are taken: tenths, and the rarest apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RarityMetricsSettings(MethodSettings):
    """The metrics have no settings."""

    def around(self, needs: MethodNeeds) -> MethodNeeds:
        """The needs of a method with these metrics, which are its own."""
        return needs


class WithRarityMetrics(WrappedLoss):
    """A method's loss, with means by the sign of the advantage and the old policy's probability of the token.

    Metrics `rarity/<negative or positive>/<lower edge>/<what>`:

    - weight: -d loss / d log p, over the token's share of the method's mean: the advantage that the token has in
      effect, whatever the method averages over. The gradient of a KL over the whole vocabulary, or of an entropy, is
      not part of it.
    - stopped: the share of tokens whose weight is 0, as a clip or a mask makes it.
    - change: p - p_old, how far earlier updates on the batch have moved the token's probability; 0 on-policy.
    """

    name = "rarity_metrics"
    Settings = RarityMetricsSettings
    settings: RarityMetricsSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        output = self.loss(inputs)
        weight = torch.zeros_like(inputs.log_probs)
        if output.loss.requires_grad and inputs.log_probs.requires_grad:
            (gradient,) = torch.autograd.grad(output.loss, inputs.log_probs, retain_graph=True, allow_unused=True)
            if gradient is not None:
                share = self._shares(inputs)
                weight = torch.where(share > 0, -gradient / share, 0.0)
        p_old = inputs.old_policy_log_probs.exp()
        values = {"weight": weight, "stopped": weight == 0, "change": inputs.log_probs.detach().exp() - p_old}
        metrics: dict[str, Mean] = {}
        for sign, of_sign in (("negative", inputs.advantages < 0), ("positive", inputs.advantages > 0)):
            for low, high in pairwise(EDGES):
                here = inputs.counted & of_sign & (p_old >= low) & ((p_old < high) | (high == 1.0))
                metrics |= {f"rarity/{sign}/{low:g}/{what}": Mean.of(value, here) for what, value in values.items()}
        return LossOutput(output.loss, output.metrics | metrics)

    def _shares(self, inputs: LossInputs) -> Tensor:
        """[T], the weight of each token in the method's mean; 0 for tokens that the method leaves out."""
        losses = torch.zeros_like(inputs.log_probs, requires_grad=True)
        (shares,) = torch.autograd.grad(self.aggregate(losses, inputs), losses)
        return shares


def with_rarity_metrics(loss: PolicyLoss) -> PolicyLoss:
    """Returns the method `loss` with metrics of what it does to rare tokens, see `WithRarityMetrics`."""
    return WithRarityMetrics(loss, RarityMetricsSettings())
