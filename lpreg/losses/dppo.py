"""DPPO: a trust region on probabilities in place of their ratio, so rare tokens may move (arXiv 2602.04879)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings, Positive, same_presets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DPPOSettings(MethodSettings):
    """Bounds of the divergence from the old policy, and of the weight."""

    divergence: Literal["tv", "kl"] = "tv"
    """How far the sampled token's probability p has moved from p_old. tv: |p - p_old|. kl: KL of (p, 1 - p) from
    (p_old, 1 - p_old). The bounds do not follow it: set both to 0.05 to have the usual ones of other code for kl."""
    bound_low: Positive = 0.2
    """A token of negative advantage has a gradient until p has fallen this far."""
    bound_high: Positive = 0.2
    """A token of positive advantage has a gradient until p has risen this far."""
    weight_bound: Positive = 20.0
    """Largest ratio that counts as a weight (c in other code)."""


class DPPO(PolicyLoss):
    """-A stop(min(r, weight_bound)) log p, without tokens beyond the bound, averaged over all tokens.

    A token is beyond its bound only in the direction in which its advantage pushes it. On-policy the loss is the plain
    policy gradient.
    """

    name = "dppo"
    Settings = DPPOSettings
    settings: DPPOSettings
    # DPPO is not in the table of Lp-Reg's paper; these are the values of its own.
    presets: ClassVar = same_presets(bound_low=0.2, bound_high=0.2, weight_bound=20.0, divergence="tv")

    def __call__(self, inputs: LossInputs) -> LossOutput:
        counted, advantages, ratio = inputs.counted, inputs.advantages, inputs.ratio.detach()
        beyond = self._beyond(inputs)
        weight = torch.where(beyond, 0.0, ratio.clamp(max=self.settings.weight_bound))
        loss = token_mean(-advantages * weight * inputs.log_probs, counted, inputs.denominator)
        metrics = {"ratio": Mean.of(ratio, counted), "clip_fraction": Mean.of(beyond, counted)}
        return LossOutput(loss, metrics)

    def _beyond(self, inputs: LossInputs) -> Tensor:
        """[T] bool, tokens beyond the bound in the direction in which their advantage pushes them."""
        advantages, log_p, log_p_old = inputs.advantages, inputs.log_probs.detach(), inputs.old_policy_log_probs
        p, p_old = log_p.exp(), log_p_old.exp()
        moved = torch.where(advantages > 0, p - p_old, p_old - p)
        if self.settings.divergence == "kl":
            smallest = torch.finfo(p.dtype).tiny
            rest, rest_old = (-x.expm1().clamp(max=-smallest) for x in (log_p, log_p_old))
            kl = p_old * (log_p_old - log_p) + rest_old * (rest_old.log() - rest.log())
            moved = torch.where(moved > 0, kl, 0.0)
        return (moved > inputs.by_sign(self.settings.bound_high, self.settings.bound_low)) & (advantages != 0)
