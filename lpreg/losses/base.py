"""What goes into a policy loss, what comes out, and what a driver may ask of it.

Legend: T tokens that carry loss, flat over the responses of one micro-batch on one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from lpreg.aggregation import Counted, token_mean
from lpreg.selection import SelectionRule

ProxySource = Literal["current", "old", "lagged"]


class StatsSettings(TypedDict, total=False):
    """Arguments of `token_stats` that a method depends on."""

    min_p: float
    """Which tokens the proxy keeps; this or fixed_tau."""
    fixed_tau: float
    entropy: Literal["grad"]
    """The loss has a gradient through the entropy."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that is still open: parts from micro-batches and ranks add up to the exact one."""

    total: Tensor
    count: Tensor

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Mean:
        """Of `values` [T] where `mask` [T] holds."""
        return cls(torch.where(mask, values.detach(), 0).sum(dtype=torch.float64), mask.sum(dtype=torch.float64))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """NaN when nothing was counted."""
        return float(self.total) / float(self.count) if float(self.count) else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """One micro-batch on one rank; all tensors are [T]. A method names the field it needs if that is missing.

    Raises:
        ValueError: shapes that differ, masks that are not bool, a denominator that is not positive.
    """

    log_probs: Tensor
    """Of the sampled tokens under the policy being trained; carries the gradient."""
    advantages: Tensor
    denominator: float | Tensor
    """What `PolicyLoss.denominator_counts` says, response tokens for most methods, counted in the whole global batch of
    this update, over all micro-batches and data-parallel ranks."""
    old_log_probs: Tensor | None = None
    """Under the policy that generated the batch. None: one update per batch, so they are log_probs itself, detached."""
    mask: Tensor | None = None
    """bool, tokens that count. None: all."""
    entropy: Tensor | None = None
    """For methods that reward or rank by entropy."""
    log_z: Tensor | None = None
    """TokenStats.log_z of the policy being trained; must be real wherever `selection` holds."""
    kept: Tensor | None = None
    """TokenStats.kept of the policy being trained."""
    old_log_z: Tensor | None = None
    """TokenStats.log_z of the policy that generated the batch."""
    old_kept: Tensor | None = None
    """TokenStats.kept of the policy that generated the batch."""
    proxy_log_probs: Tensor | None = None
    """TokenStats.proxy_log_probs of a lagged policy: log q of the sampled token, -inf where it is filtered."""
    proxy_kl: Tensor | None = None
    """TokenStats.proxy_kl of an old or lagged policy's stored proxy: KL(q || p) over the whole vocabulary, with its
    gradient; must be real wherever `selection` holds."""
    reference_log_probs: Tensor | None = None
    """Of the sampled tokens under a frozen reference policy, for `with_reference_kl`."""
    rollout_log_probs: Tensor | None = None
    """Of the sampled tokens as the rollout engine reported them, for `with_correction`."""
    sequence_ids: Tensor | None = None
    """Which response a token belongs to, for methods that work on whole responses."""
    groups: Tensor | None = None
    """Which prompt a token's response answers, for methods that work on groups."""
    selection: Tensor | None = None
    """bool, this micro-batch's part of the globally selected tokens, for methods with a selection rule."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name != "denominator" and value.shape != self.log_probs.shape:
                raise ValueError(
                    f"{field.name} has shape {list(value.shape)}, but log_probs has {list(self.log_probs.shape)}"
                )
        for name in ("mask", "kept", "old_kept", "selection"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {value.dtype}")
        if not isinstance(self.denominator, Tensor) and self.denominator <= 0:
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


@dataclass(frozen=True, slots=True)
class LossOutput:
    loss: Tensor
    """Scalar: this micro-batch's sum over tokens, over the global denominator. Adds up over micro-batches and ranks."""
    metrics: dict[str, Mean]
    """Detached, without a prefix; the same names on every call."""


class PolicyLoss(ABC):
    """A method with its settings. Holds no state, so one object serves every micro-batch."""

    name: ClassVar[str]
    Settings: ClassVar[type[Any]]
    """Frozen dataclass of the method's settings; raises ValueError on values that make no sense."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def selection(self) -> SelectionRule | None:
        """Which response tokens of the global batch the caller must mark in LossInputs.selection before the first
        backward, by `apply_rule`. None: the method needs no selection."""
        return None

    @property
    def denominator_counts(self) -> Counted:
        """What LossInputs.denominator must count over the global batch."""
        return "tokens"

    @property
    def acts_without_advantage(self) -> bool:
        """Whether tokens of advantage 0 have a gradient, so that a caller must not leave them out."""
        return False

    @property
    def token_separable(self) -> bool:
        """Whether the loss is a sum over tokens in which none looks at another of the micro-batch, so that it may be
        taken a few tokens at a time (`fused_loss`)."""
        return True

    @property
    def proxy_source(self) -> ProxySource | None:
        """Whose filter statistics the method reads: log_z and kept of the "current" policy, old_log_z and old_kept
        ("old"), or proxy_log_probs ("lagged"). None: nobody's."""
        return None

    @property
    def needs_proxy_kl(self) -> bool:
        """Whether LossInputs.proxy_kl must be given where the proxy is not the policy in training: a caller must then
        store that of the other policy (`token_stats(proxy_rows=...)`) for the tokens that may matter."""
        return False

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        """[T] bool, tokens whose advantage [T] lets the proxy matter; for others a lagged one need not be computed."""
        return torch.zeros_like(advantages, dtype=torch.bool)

    def token_stats_kwargs(self) -> StatsSettings:
        """What to hand to `token_stats`: the filter, and entropy="grad" where the loss needs it; else empty."""
        return {}

    def aggregate(self, token_losses: Tensor, inputs: LossInputs) -> Tensor:
        """Scalar, this part's share of the mean that the method takes of token losses [T]."""
        return token_mean(token_losses, inputs.counted, inputs.denominator)

    @abstractmethod
    def __call__(self, inputs: LossInputs) -> LossOutput:
        """This micro-batch's share of the loss and of the metrics.

        Raises:
            ValueError: a field that the method needs and that is missing, by name.
        """

    def need(self, value: Tensor | None, field: str) -> Tensor:
        if value is None:
            raise ValueError(f"{self.name} needs LossInputs.{field}")
        return value


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")
