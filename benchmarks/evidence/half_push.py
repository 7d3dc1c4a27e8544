"""A control without proxy and filter: rare tokens of negative advantage are pushed down half as hard."""

from __future__ import annotations

from dataclasses import dataclass

from lpreg import LossInputs, LossOutput, Mean, MethodNeeds, MethodSettings, PolicyLoss
from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.settings import Share, ShareOrZero
from lpreg.needs import SelectionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfPushSettings(MethodSettings):
    """Which tokens are pushed less, and by how much."""

    rho: Share = 0.05
    """Share of the response tokens that count as rare, lowest probability first, as in Lp-Reg."""
    push: ShareOrZero = 0.5
    """Factor of their advantages, if these are negative."""

    @property
    def needs(self) -> MethodNeeds:
        return MethodNeeds(selection=SelectionRule(kind="lowest_log_prob", fraction=self.rho))


class HalfPush(PolicyLoss):
    """-r A, with push * A in place of A on rare tokens of negative advantage, averaged over tokens."""

    name = "half_push"
    Settings = HalfPushSettings
    settings: HalfPushSettings

    def __call__(self, inputs: LossInputs) -> LossOutput:
        rare = self.need(inputs.selection, "selection") & (inputs.advantages < 0)
        advantages = torch.where(rare, self.settings.push * inputs.advantages, inputs.advantages)
        loss = token_mean(-advantages * inputs.ratio, inputs.counted, inputs.denominator)
        return LossOutput(loss, {"selected_fraction": Mean.of(rare, inputs.counted)})
