"""STAPO: leaves out spurious tokens, which are rare, certain and rewarded (S2T, arXiv 2602.15620)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.ppo import PPOSettings, ppo_clip
from lpreg.losses.settings import Share, same_presets
from lpreg.needs import MethodNeeds, SelectionRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class STAPOSettings(PPOSettings):
    """Bounds of the ratio, and which tokens are spurious."""

    tau_p: Share = 0.01
    """A spurious token has a probability below this."""
    entropy_share: Share = 0.05
    """A spurious token has an entropy below this quantile of all response tokens. Tokens that tie at the quantile are
    not below it."""

    @property
    def needs(self) -> MethodNeeds:
        rule = SelectionRule(kind="not_spurious", fraction=self.entropy_share, probability=self.tau_p)
        return MethodNeeds(selection=rule, denominator_counts="selected_tokens")


class STAPO(PolicyLoss):
    """The PPO clip without tokens of A > 0, p < tau_p and low entropy, averaged over the tokens that stay.

    The rule marks the tokens that stay. Probabilities and entropies are those of the policy that generated the batch,
    and the entropies are ranked over the global batch. Lp-Reg is the mirror image: it protects rare tokens of A < 0.
    """

    name = "stapo"
    Settings = STAPOSettings
    settings: STAPOSettings
    # STAPO is not in the table of Lp-Reg's paper; the thresholds are those of its own, from a secondary source.
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.2, tau_p=0.01, entropy_share=0.05)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ratio, counted = inputs.ratio, inputs.counted
        staying = self.need(inputs.selection, "selection") & counted
        losses, clipped = ppo_clip(ratio, inputs.advantages, self.settings)
        metrics = {
            "ratio": Mean.of(ratio, staying),
            "clip_fraction": Mean.of(clipped, staying),
            "spurious_fraction": Mean.of(~staying, counted),
        }
        return LossOutput(self.aggregate(losses, inputs), metrics)

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        staying = self.need(inputs.selection, "selection") & inputs.counted
        return token_mean(token_losses, staying, inputs.denominator)
