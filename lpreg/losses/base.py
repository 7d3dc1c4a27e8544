"""The inputs and outputs of a policy loss, and what a method tells its driver.

Legend: T tokens that carry loss, flat over the responses of one micro-batch on one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """One micro-batch on one rank; all tensors are [T]. A method raises ValueError for a field that it needs and that
    is missing.

    Raises:
        ValueError: shapes that differ, masks that are not bool, a denominator that is not positive.
    """

    log_probs: Tensor
    """Log-probs of the sampled tokens under the policy in training; they carry the gradient."""
    advantages: Tensor
    """Advantages of the sampled tokens."""
    denominator: float | Tensor
    """The count that `PolicyLoss.denominator_counts` names (response tokens for most methods) in the whole global batch
    of this update, over all micro-batches and data-parallel ranks."""
    old_log_probs: Tensor | None = None
    """Log-probs under the policy that generated the batch. None: there is one update per batch, so they equal
    log_probs."""
    mask: Tensor | None = None
    """bool, the tokens that count. None: all tokens."""
    entropy: Tensor | None = None
    """Entropies in nats, for methods that reward or rank by entropy."""
    log_z: Tensor | None = None
    """TokenStats.log_z of the policy in training; must be computed wherever `selection` holds."""
    in_filter: Tensor | None = None
    """TokenStats.in_filter of the policy in training."""
    old_log_z: Tensor | None = None
    """TokenStats.log_z of the policy that generated the batch."""
    old_in_filter: Tensor | None = None
    """TokenStats.in_filter of the policy that generated the batch."""
    proxy_log_probs: Tensor | None = None
    """TokenStats.proxy_log_probs of a lagged policy: log q of the sampled token, -inf if the token is filtered."""
    proxy_kl: Tensor | None = None
    """TokenStats.proxy_kl of an old or lagged policy's stored proxy: KL(q || p) over the whole vocabulary, with its
    gradient; must be computed wherever `selection` holds."""
    reference_log_probs: Tensor | None = None
    """Log-probs of the sampled tokens under a frozen reference policy, for `with_reference_kl`."""
    rollout_log_probs: Tensor | None = None
    """Log-probs of the sampled tokens as the rollout engine reported them, for `with_correction`."""
    sequence_ids: Tensor | None = None
    """The response that each token belongs to, for methods that work on whole responses."""
    selection: Tensor | None = None
    """bool, this micro-batch's part of the globally selected tokens, for methods with a selection rule."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and field.name != "denominator" and value.shape != self.log_probs.shape:
                raise ValueError(
                    f"{field.name} has shape {list(value.shape)}, but log_probs has {list(self.log_probs.shape)}"
                )
        for name in ("mask", "in_filter", "old_in_filter", "selection"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {value.dtype}")
        if not isinstance(self.denominator, torch.Tensor) and self.denominator <= 0:
            raise ValueError(
                "denominator must be a count over the global batch (of response tokens, unless the method's "
                f"denominator_counts says otherwise), got {self.denominator}"
            )

    @property
    def counted(self) -> Tensor:
        """[T] bool: `mask`, or all tokens."""
        return torch.ones_like(self.log_probs, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def log_ratio(self) -> Tensor:
        """[T], log pi - log pi_old of the sampled token; without old_log_probs 0, with the policy gradient attached."""
        old = self.log_probs if self.old_log_probs is None else self.old_log_probs
        return self.log_probs - old.detach()

    @property
    def ratio(self) -> Tensor:
        """[T], pi / pi_old of the sampled token; without old_log_probs exactly 1, with the policy gradient attached."""
        return self.log_ratio.exp()


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

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        return self.loss.aggregate(token_losses, inputs)
