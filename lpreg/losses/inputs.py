"""The inputs of a policy loss.

Legend: T tokens that carry loss, flat over the responses of one micro-batch on one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lpreg._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of a log ratio before its exponential, as in other trainers: exp(89) is beyond fp32, and a gradient of 0 * inf
is NaN."""

FINITE = (
    *("log_probs", "advantages", "old_log_probs", "entropy", "entropy_coefficient", "filter_entropy", "proxy_kl"),
    "reference_log_probs",
)
"""Fields whose counted values must be finite."""
MAY_BE_MINUS_INFINITY = ("log_z", "old_log_z", "proxy_log_probs")
"""Fields whose counted values may be -inf too: a filter that keeps nothing, a token outside the filter."""


def check_counted(values: Mapping[str, Any], mask: Tensor | None) -> None:
    """Raises ValueError for the first value of a token in `mask` [T] that is not finite, at once or with the postponed
    checks. values: fields of LossInputs by name."""
    from lpreg.statistics.checks import refuse

    bad = {}
    for name in (*FINITE, *MAY_BE_MINUS_INFINITY):
        if (value := values.get(name)) is not None:
            finite = value.detach() < torch.inf if name in MAY_BE_MINUS_INFINITY else value.detach().isfinite()
            bad[name] = ~finite if mask is None else ~finite & mask
    if not bad:
        return

    def message() -> str:
        name, flags = next((name, flags) for name, flags in bad.items() if flags.any())
        token = int(flags.flatten().nonzero()[0])
        return (
            f"{name}[{token}] is {float(values[name].flatten()[token])}, the first of {int(flags.sum())} such "
            f"values; {name} of counted tokens must be finite, and `mask` leaves out tokens that do not count"
        )

    refuse(torch.stack([flags.any() for flags in bad.values()]).any(), message)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossInputs:
    """One micro-batch on one rank; all tensors are [T]. A method raises ValueError for a field that it needs and that
    is missing.

    Values of tokens that `mask` leaves out may be anything, NaN included: they are replaced by zeros here, before any
    arithmetic, so they reach neither a loss nor a gradient.

    Raises:
        ValueError: shapes that differ, masks that are not bool, a denominator that is not positive, a value of a
            counted token that is not finite.
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
    entropy_coefficient: Tensor | None = None
    """Weight of the entropy bonus in this update, the same for every token, for methods that adapt it. None: the weight
    of the method's settings."""
    log_z: Tensor | None = None
    """TokenStats.log_z of the policy in training; must be computed wherever `selection` holds."""
    in_filter: Tensor | None = None
    """TokenStats.in_filter of the policy in training."""
    filter_entropy: Tensor | None = None
    """TokenStats.filter_entropy of the policy in training, with its gradient."""
    filter_extent: Tensor | None = None
    """TokenStats.filter_extent of the policy in training."""
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
            if isinstance(value := getattr(self, field.name), torch.Tensor) and value.dtype == torch.float16:
                # A ratio may exceed the largest float16, 65,504.
                object.__setattr__(self, field.name, value.float())
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "denominator"}
        given = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        for name, value in given.items():
            if value.shape != self.log_probs.shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}, but log_probs has {list(self.log_probs.shape)}"
                )
        for name in ("mask", "in_filter", "old_in_filter", "selection"):
            if name in given and given[name].dtype != torch.bool:
                raise ValueError(f"{name} must be bool, got {given[name].dtype}")
        if not isinstance(self.denominator, torch.Tensor) and self.denominator <= 0:
            raise ValueError(
                "denominator must be a count over the global batch (of response tokens, unless the method's "
                f"denominator_counts says otherwise), got {self.denominator}"
            )
        if self.mask is not None:
            for name, value in given.items():
                if name not in ("mask", "sequence_ids"):
                    zero = False if value.dtype == torch.bool else 0
                    object.__setattr__(self, name, torch.where(self.mask, value, zero))
        check_counted(given, self.mask)

    @property
    def counted(self) -> Tensor:
        """[T] bool: `mask`, or all tokens."""
        return torch.ones_like(self.log_probs, dtype=torch.bool) if self.mask is None else self.mask

    def by_sign(self, positive: float, other: float) -> Tensor:
        """[T] in the precision of log_probs, `positive` where the advantage is positive, `other` elsewhere."""
        return torch.full_like(self.log_probs, other).masked_fill(self.advantages > 0, positive)

    @property
    def old_policy_log_probs(self) -> Tensor:
        """[T], detached, log-probs under the policy that generated the batch: old_log_probs, or without them
        log_probs."""
        return (self.log_probs if self.old_log_probs is None else self.old_log_probs).detach()

    @property
    def log_ratio(self) -> Tensor:
        """[T], log pi - log pi_old of the sampled token; without old_log_probs 0, with the policy gradient attached."""
        return self.log_probs - self.old_policy_log_probs

    @property
    def ratio(self) -> Tensor:
        """[T], pi / pi_old of the sampled token, bounded by exp(-20) and exp(20) without a gradient beyond; without
        old_log_probs exactly 1, with the policy gradient attached."""
        return self.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
