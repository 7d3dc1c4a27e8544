"""80/20: only the tokens where the policy was undecided are trained (Wang et al., arXiv 2506.01939)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lpreg.aggregation import Counted, token_mean
from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, check_range
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.selection import SelectionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class HighEntropySettings(PPOSettings):
    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high where the advantage is positive."""
    share: float = 0.2
    """Of all response tokens, highest entropy first, that carry the loss."""

    def __post_init__(self) -> None:
        PPOSettings.__post_init__(self)
        check_range("share", self.share, 0.0, 1.0, open_low=True)


class HighEntropy(PolicyLoss):
    """The PPO clip on the selected tokens alone, averaged over them: the denominator counts selected tokens.

    Entropies are ranked over the global batch, of the policy that generated it.
    """

    name = "high_entropy"
    Settings = HighEntropySettings
    settings: HighEntropySettings

    @property
    def selection(self) -> SelectionRule:
        return SelectionRule(kind="highest_entropy", fraction=self.settings.share)

    @property
    def denominator_counts(self) -> Counted:
        return "selected_tokens"

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
