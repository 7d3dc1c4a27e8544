"""TRE: an entropy bonus over plausible tokens only, so that no probability goes to the tail (arXiv 2602.03635)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import NonNegative, PositiveInt, Share, same_presets
from lpreg.needs import MethodNeeds, StatsSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class TRESettings(PPOSettings):
    """Bounds of the ratio, the weight of the bonus, and which tokens are plausible."""

    coefficient: NonNegative = 0.001
    """Weight of the mean bonus, which is in nats."""
    region: Literal["top_k", "top_p", "min_p"] = "top_k"
    """The tokens whose entropy counts. top_k: the likeliest top_k (TRE-K); top_p: the likeliest that together have
    top_p (TRE-P); min_p: those with p >= min_p * max p, which are Lp-Reg's proxy. Tokens that tie with the last one
    count too."""
    top_k: PositiveInt = 2
    """Number of tokens; read only with region: top_k."""
    top_p: Share = 0.99
    """Probability of the tokens together; read only with region: top_p."""
    min_p: Share = 0.02
    """Probability relative to that of the likeliest token; read only with region: min_p."""

    @property
    def needs(self) -> MethodNeeds:
        stats: StatsSettings = {"filter_entropy": True}
        stats |= {
            "top_k": StatsSettings(top_k=self.top_k),
            "top_p": StatsSettings(top_p=self.top_p),
            "min_p": StatsSettings(min_p=self.min_p),
        }[self.region]
        return MethodNeeds(acts_without_advantage=True, token_stats=stats)


class TRE(PolicyLoss):
    """The PPO clip - coefficient * (ln V / ln |S|) H(q), averaged over tokens.

    q is the policy, renormalised over the plausible tokens S, and V is the size of the vocabulary, so the largest bonus
    is the same for every size of S. A token with one plausible token has no bonus. Tokens with advantage 0 have a
    gradient too, so no token may be left out of the update. For top_p and min_p the factor with |S| in place of K is
    ours.
    """

    name = "tre"
    Settings = TRESettings
    settings: TRESettings
    # TRE is not in the table of Lp-Reg's paper; these are the values of TRE-K in its own.
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.2, coefficient=0.001, region="top_k", top_k=2)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        entropy = self.need(inputs.filter_entropy, "filter_entropy")
        extent = self.need(inputs.filter_extent, "filter_extent")
        if inputs.log_probs.requires_grad and not entropy.requires_grad:
            raise ValueError("tre needs LossInputs.filter_entropy with its gradient: token_stats(filter_entropy=True)")
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        bonus = torch.where(extent > 0, entropy / extent.masked_fill(extent == 0, 1.0), 0.0)
        loss = token_mean(losses - self.settings.coefficient * bonus, counted, inputs.denominator)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of(clipped, counted),
            "filter_entropy": Mean.of(entropy, counted),
        }
        return LossOutput(loss, metrics)
