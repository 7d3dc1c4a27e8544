"""GRPO with an entropy loss: the PPO clip less a share of the mean entropy (the bonus of PPO, arXiv 1707.06347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import NonNegative, Positive, same_presets
from lpreg.needs import MethodNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBonusSettings(PPOSettings):
    """Bounds of the ratio, and the weight of the bonus."""

    coefficient: NonNegative = 0.002
    """Weight of the mean entropy, which is in nats; with a target, that of the first update."""
    target: NonNegative | None = None
    """Mean entropy that the weight is adapted to, in nats: after each update it rises by `step` if the mean was below
    the target, and otherwise falls by it, down to 0. After Skywork-OR1 (arXiv 2505.22312), which besides leaves out the
    bonus while the mean is not below the target. None: the weight is constant."""
    step: Positive = 0.005
    """Change of the weight after an update; read only with a target."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(acts_without_advantage=True, token_stats={"entropy": "grad"})


class EntropyBonus(PolicyLoss):
    """GRPO - coefficient * H, averaged over tokens. The entropy must carry its gradient.

    Tokens with advantage 0 have a gradient too, so no token may be left out of the update. With a target, the driver
    keeps the coefficient between updates (`next_entropy_coefficient`) and gives it in LossInputs.
    """

    name = "entropy_bonus"
    Settings = EntropyBonusSettings
    settings: EntropyBonusSettings
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.2, coefficient=0.002)

    def next_entropy_coefficient(self, coefficient: float | None, entropy: float) -> float | None:
        if self.settings.target is None:
            return None
        change = self.settings.step if entropy < self.settings.target else -self.settings.step
        return max(0.0, (self.settings.coefficient if coefficient is None else coefficient) + change)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        entropy = self.need(inputs.entropy, "entropy")
        if inputs.log_probs.requires_grad and not entropy.requires_grad:
            raise ValueError("entropy_bonus needs LossInputs.entropy with its gradient: token_stats(entropy='grad')")
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        given = inputs.entropy_coefficient
        coefficient = torch.full_like(entropy, self.settings.coefficient) if given is None else given.to(entropy.dtype)
        loss = token_mean(losses - coefficient * entropy, counted, inputs.denominator)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of(clipped, counted),
            "entropy_coefficient": Mean.of(coefficient, counted),
        }
        return LossOutput(loss, metrics)
