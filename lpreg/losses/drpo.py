"""DRPO: DPPO's trust region as a penalty that grows smoothly, and pulls back beyond the bound (arXiv 2606.09821)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings, Positive, same_presets


@dataclass(frozen=True, slots=True, kw_only=True)
class DRPOSettings(MethodSettings):
    """How far the sampled token's probability p may move from p_old until its gradient turns round."""

    bound_low: Positive = 0.2
    """The fall of p at which the gradient of a token of negative advantage is 0."""
    bound_high: Positive = 0.2
    """The rise of p at which the gradient of a token of positive advantage is 0."""


class DRPO(PolicyLoss):
    """-(r A - |A| p_old (r - 1)^2 / (2 bound)), averaged over tokens.

    The gradient is that of -r A times 1 - sign(A) (p - p_old) / bound: weaker towards the bound, reversed beyond it,
    and stronger on a token that moved against its advantage. The formula is put together from descriptions of the
    paper's gradient; its code is not public. On-policy the loss is the plain policy gradient.
    """

    name = "drpo"
    Settings = DRPOSettings
    settings: DRPOSettings
    # DRPO is not in the table of Lp-Reg's paper; these are DPPO's bounds.
    presets: ClassVar = same_presets(bound_low=0.2, bound_high=0.2)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        counted, advantages, ratio = inputs.counted, inputs.advantages, inputs.ratio
        bound = inputs.by_sign(self.settings.bound_high, self.settings.bound_low)
        p_old = inputs.old_policy_log_probs.exp()
        penalty = advantages.abs() * p_old * (ratio - 1).square() / (2 * bound)
        loss = token_mean(penalty - advantages * ratio, counted, inputs.denominator)
        beyond = advantages.sign() * p_old * (ratio.detach() - 1) > bound
        return LossOutput(loss, {"ratio": Mean.of(ratio, counted), "clip_fraction": Mean.of(beyond, counted)})
