"""GRPO: the PPO clip with group-relative advantages and a token-mean, no KL term (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lpreg.aggregation import Counted, constant_length_mean, sequence_mean_token_mean, token_mean
from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, check_choice, check_range
from lpreg.losses.ppo import PPOSettings, ppo_clip


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSettings(PPOSettings):
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "constant_length"] = "token_mean"
    """"token_mean": over all response tokens of the global batch. "sequence_mean_token_mean": over tokens in each
    response, then over responses (GRPO as first published). "constant_length": the sum over constant_length times the
    count of responses (Dr. GRPO, arXiv 2503.20783)."""
    constant_length: int | None = None
    """Tokens; required by that aggregation, usually the longest response allowed."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        check_choice("aggregation", self.aggregation, ("token_mean", "sequence_mean_token_mean", "constant_length"))
        if (self.constant_length is not None) != (self.aggregation == "constant_length"):
            raise ValueError(
                "constant_length must be given with aggregation='constant_length' and with no other, got "
                f"constant_length={self.constant_length} and aggregation={self.aggregation!r}"
            )
        if self.constant_length is not None:
            check_range("constant_length", self.constant_length, 1, float("inf"))


class GRPO(PolicyLoss):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), averaged over tokens. The clip is inert on-policy."""

    name = "grpo"
    Settings = GRPOSettings
    settings: GRPOSettings

    @property
    def denominator_counts(self) -> Counted:
        return "tokens" if self.settings.aggregation == "token_mean" else "sequences"

    @property
    def token_separable(self) -> bool:
        return self.settings.aggregation != "sequence_mean_token_mean"

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        metrics = {"ratio": Mean.of(ratio, counted), "clip_fraction": Mean.of(clipped, counted)}
        return LossOutput(self.aggregate(losses, inputs), metrics)

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        counted, denominator = inputs.counted, inputs.denominator
        if self.settings.aggregation == "sequence_mean_token_mean":
            sequence_ids = self.need(inputs.sequence_ids, "sequence_ids")
            return sequence_mean_token_mean(token_losses, counted, sequence_ids, denominator)
        if self.settings.constant_length is not None:
            return constant_length_mean(token_losses, counted, self.settings.constant_length, denominator)
        return token_mean(token_losses, counted, denominator)
