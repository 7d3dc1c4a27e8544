"""GRPO with an entropy loss: the PPO clip less a share of the mean entropy (the bonus of PPO, arXiv 1707.06347)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, StatsSettings, check_range
from lpreg.losses.ppo import PPOSettings, ppo_clip


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBonusSettings(PPOSettings):
    coefficient: float = 0.002
    """Weight of the entropy, nats."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        check_range("coefficient", self.coefficient, 0.0, math.inf)


class EntropyBonus(PolicyLoss):
    """GRPO - coefficient * H, averaged over tokens. The entropy must come with its gradient.

    Tokens of advantage 0 have a gradient too, so none may be left out of the update.
    """

    name = "entropy_bonus"
    Settings = EntropyBonusSettings
    settings: EntropyBonusSettings

    @property
    def acts_without_advantage(self) -> bool:
        return True

    def token_stats_kwargs(self) -> StatsSettings:
        return {"entropy": "grad"}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        entropy = self.need(inputs.entropy, "entropy")
        if inputs.log_probs.requires_grad and not entropy.requires_grad:
            raise ValueError("entropy_bonus needs LossInputs.entropy with its gradient: token_stats(entropy='grad')")
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        loss = token_mean(losses - self.settings.coefficient * entropy, counted, inputs.denominator)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of(clipped, counted),
        }
        return LossOutput(loss, metrics)
