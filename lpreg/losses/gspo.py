"""GSPO: one ratio for a whole response (arXiv 2507.18071), in its token form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lpreg.aggregation import mean_of_sequence, sequence_mean_token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import MAX_LOG_RATIO, LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import NonNegative, ShareOrZero, same_presets
from lpreg.needs import MethodNeeds

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GSPOSettings(PPOSettings):
    """Bounds of a response's ratio."""

    clip_low: ShareOrZero = 3e-4
    """The response's ratio counts down to 1 - clip_low if the advantage is negative."""
    clip_high: NonNegative = 4e-4
    """The response's ratio counts up to 1 + clip_high if the advantage is positive."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(denominator_counts="sequences", token_separable=False)


class GSPO(PolicyLoss):
    """The PPO clip on s = exp(mean over the response of log r), averaged over tokens, then over responses.

    In the token form each token carries s with its own gradient, s * p / stop(p), so advantages may differ within a
    response; if they do not, value and gradient are those of the ratio of the whole response. On-policy only the
    average over responses has an effect. A response must not be split over micro-batches or ranks.
    """

    name = "gspo"
    Settings = GSPOSettings
    settings: GSPOSettings
    presets: ClassVar = same_presets(clip_low=3e-4, clip_high=4e-4)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        counted = inputs.counted
        sequence_ids = self.need(inputs.sequence_ids, "sequence_ids")
        mean_log_ratio = mean_of_sequence(inputs.log_ratio.detach(), counted, sequence_ids)
        mean_log_ratio = mean_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = (mean_log_ratio + inputs.log_probs - inputs.log_probs.detach()).exp()
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        metrics = {"ratio": Mean.of(ratio, counted), "clip_fraction": Mean.of(clipped, counted)}
        return LossOutput(self.aggregate(losses, inputs), metrics)

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        sequence_ids = self.need(inputs.sequence_ids, "sequence_ids")
        return sequence_mean_token_mean(token_losses, inputs.counted, sequence_ids, inputs.denominator)
