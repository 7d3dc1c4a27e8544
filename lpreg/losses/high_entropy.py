"""80/20: only the tokens of highest entropy are trained (Wang et al., arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import NonNegative, Share, same_presets
from lpreg.needs import MethodNeeds, SelectionRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HighEntropySettings(PPOSettings):
    """Bounds of the ratio, and which tokens carry the loss."""

    clip_high: NonNegative = 0.28
    """The ratio counts up to 1 + clip_high if the advantage is positive."""
    share: Share = 0.2
    """Share of all response tokens that carries the loss, highest entropy first."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(
            selection=SelectionRule(kind="highest_entropy", fraction=self.share), denominator_counts="selected_tokens"
        )


class HighEntropy(PolicyLoss):
    """The PPO clip on the selected tokens alone, averaged over them: the denominator counts selected tokens.

    The entropies of the policy that generated the batch are ranked over the global batch.
    """

    name = "high_entropy"
    Settings = HighEntropySettings
    settings: HighEntropySettings
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.28, share=0.2)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        carrying = self.need(inputs.selection, "selection") & counted
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        metrics = {
            "ratio": Mean.of(ratio, carrying),
            "clip_fraction": Mean.of(clipped, carrying),
            "selected_fraction": Mean.of(carrying, counted),
        }
        return LossOutput(self.aggregate(losses, inputs), metrics)

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        carrying = self.need(inputs.selection, "selection") & inputs.counted
        return token_mean(token_losses, carrying, inputs.denominator)
