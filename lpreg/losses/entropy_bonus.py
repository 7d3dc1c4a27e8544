"""GRPO with an entropy loss: the PPO clip less a share of the mean entropy (the bonus of PPO, arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import NonNegative, same_presets
from lpreg.needs import MethodNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBonusSettings(PPOSettings):
    """Bounds of the ratio, and the weight of the bonus."""

    coefficient: NonNegative = 0.002
    """Weight of the mean entropy, which is in nats."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(acts_without_advantage=True, token_stats={"entropy": "grad"})


class EntropyBonus(PolicyLoss):
    """GRPO - coefficient * H, averaged over tokens. The entropy must carry its gradient.

    Tokens with advantage 0 have a gradient too, so no token may be left out of the update.
    """

    name = "entropy_bonus"
    Settings = EntropyBonusSettings
    settings: EntropyBonusSettings
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.2, coefficient=0.002)

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
