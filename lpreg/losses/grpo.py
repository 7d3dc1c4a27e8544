"""GRPO: the PPO clip with group-relative advantages and a token-mean, no KL term (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lpreg.aggregation import constant_length_mean, sequence_mean_token_mean, token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import PositiveInt, same_presets
from lpreg.needs import MethodNeeds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSettings(PPOSettings):
    """Bounds of the ratio, and how token losses become one."""

    aggregation: Literal["token_mean", "sequence_mean_token_mean", "constant_length"] = "token_mean"
    """token_mean: the mean over all response tokens of the global batch. sequence_mean_token_mean: the mean over the
    tokens of each response, then over responses (GRPO as first published). constant_length: the sum divided by
    constant_length times the number of responses (Dr. GRPO, arXiv 2503.20783)."""
    constant_length: PositiveInt | None = None
    """Number of tokens that each response counts as, usually the longest response allowed; required by aggregation:
    constant_length, and only allowed with it."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        if (self.constant_length is not None) != (self.aggregation == "constant_length"):
            raise ValueError(
                "constant_length must be given with aggregation='constant_length' and with no other, got "
                f"constant_length={self.constant_length} and aggregation={self.aggregation!r}"
            )

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(
            denominator_counts="tokens" if self.aggregation == "token_mean" else "sequences",
            token_separable=self.aggregation != "sequence_mean_token_mean",
        )


class GRPO(PolicyLoss):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), averaged over tokens. The clip is inert on-policy."""

    name = "grpo"
    Settings = GRPOSettings
    settings: GRPOSettings
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.2)

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
