"""What a policy loss returns, and what a method tells its driver.

Legend: T tokens that carry loss, flat over the responses of one micro-batch on one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.inputs import LossInputs
from lpreg.losses.settings import MethodSettings
from lpreg.needs import Counted, MethodNeeds, ProxySource, SelectionRule, StatsSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """A mean as its sum and count: parts from micro-batches and ranks add up to the exact mean."""

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Mean:
        """The mean of `values` [T] where `mask` [T] holds."""
        return cls(torch.where(mask, values.detach(), 0).sum(dtype=torch.float64), mask.sum(dtype=torch.float64))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN if nothing was counted."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """What a policy loss returns for one micro-batch."""

    loss: Tensor
    """Scalar: this micro-batch's sum over tokens, over the global denominator. Adds up over micro-batches and ranks."""
    metrics: dict[str, Mean]
    """Detached, without a prefix; the same names on every call."""


class PolicyLoss(ABC):
    """A method with its settings. It holds no state, so one object serves every micro-batch.

    A method is one file: a dataclass of settings (`MethodSettings`) that also says what the method needs, and a
    subclass of this class. `lpreg/losses/<name>.py` is found by its name; a file elsewhere by its import path.
    """

    name: ClassVar[str]
    """The name in `make_loss`, in configurations and in messages."""
    Settings: ClassVar[type[Any]]
    """Subclass of MethodSettings: a frozen dataclass of the method's settings."""
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named settings, such as those of a paper."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def needs(self) -> MethodNeeds:
        """What the method needs from its driver: what its settings say. The properties below are the fields."""
        return self.settings.needs if isinstance(self.settings, MethodSettings) else MethodNeeds()

    @property
    def selection(self) -> SelectionRule | None:
        return self.needs.selection

    @property
    def denominator_counts(self) -> Counted:
        return self.needs.denominator_counts

    @property
    def acts_without_advantage(self) -> bool:
        return self.needs.acts_without_advantage

    @property
    def token_separable(self) -> bool:
        return self.needs.token_separable

    @property
    def proxy_source(self) -> ProxySource | None:
        return self.needs.proxy_source

    @property
    def needs_proxy_kl(self) -> bool:
        return self.needs.needs_proxy_kl

    def token_stats_kwargs(self) -> StatsSettings:
        """Arguments for `token_stats`: the filter, and entropy="grad" if the loss needs it; empty otherwise."""
        return self.needs.token_stats

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        """[T] bool, tokens whose advantage [T] lets the proxy matter; a lagged proxy need not be computed for
        others."""
        return torch.zeros_like(advantages, dtype=torch.bool)

    def next_entropy_coefficient(self, coefficient: float | None, entropy: float) -> float | None:
        """Returns LossInputs.entropy_coefficient of the next update, for methods that adapt it; None otherwise.

        coefficient: that of this update, None for the first one; entropy: the mean over this update's tokens, in nats.
        """
        return None

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        """Scalar, this part's share of the mean that the method takes of token losses [T]."""
        return token_mean(token_losses, inputs.counted, inputs.denominator)

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> LossOutput:
        """Returns this micro-batch's share of the loss and of the metrics.

        Raises:
            ValueError: a field that the method needs is missing; the message names it.
        """

    def need(self, value: Tensor | None, field: str) -> Tensor:
        """Returns `value`, or raises ValueError if it is None."""
        if value is None:
            raise ValueError(f"{self.name} needs LossInputs.{field}")
        return value


class WrappedLoss(PolicyLoss):
    """A method with something around it, which a driver treats as that method; `settings` are the wrapper's own."""

    def __init__(self, loss: PolicyLoss, settings: Any) -> None:
        super().__init__(settings)
        self.loss = loss

    @property
    def needs(self) -> MethodNeeds:
        """The needs of the wrapped method, as the wrapper changes them."""
        needs: MethodNeeds = self.settings.around(self.loss.needs)
        return needs

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        return self.loss.uses_proxy(advantages)

    def next_entropy_coefficient(self, coefficient: float | None, entropy: float) -> float | None:
        return self.loss.next_entropy_coefficient(coefficient, entropy)

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        return self.loss.aggregate(token_losses, inputs)
