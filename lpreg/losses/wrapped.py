"""A method with something around it, to a driver still that method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lpreg.aggregation import Counted
from lpreg.losses.base import LossInputs, PolicyLoss, ProxySource, StatsSettings
from lpreg.selection import SelectionRule


class WrappedLoss(PolicyLoss):
    """Passes on what a driver asks of the method `loss`; `settings` are the wrapper's own."""

    def __init__(self, loss: PolicyLoss, settings: Any) -> None:
        super().__init__(settings)
        self.loss = loss

    @property
    def selection(self) -> SelectionRule | None:
        return self.loss.selection

    @property
    def denominator_counts(self) -> Counted:
        return self.loss.denominator_counts

    @property
    def acts_without_advantage(self) -> bool:
        return self.loss.acts_without_advantage

    @property
    def token_separable(self) -> bool:
        return self.loss.token_separable

    @property
    def proxy_source(self) -> ProxySource | None:
        return self.loss.proxy_source

    @property
    def needs_proxy_kl(self) -> bool:
        return self.loss.needs_proxy_kl

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        return self.loss.uses_proxy(advantages)

    def token_stats_kwargs(self) -> StatsSettings:
        return self.loss.token_stats_kwargs()

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        return self.loss.aggregate(token_losses, inputs)
