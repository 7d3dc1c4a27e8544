"""What a method needs from its driver, as plain values that are known without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

ProxySource = Literal["current", "old", "lagged"]
"""The policy whose filtered distribution is the proxy: the one in training, the one that sampled, an older snapshot."""

Counted = Literal["tokens", "selected_tokens", "sequences"]
"""What a denominator counts over the whole global batch of an update: response tokens, the selected ones among them, or
sequences (responses)."""

SelectionKind = Literal[
    "lowest_log_prob", "highest_entropy", "highest_covariance", "random_in_covariance", "random", "not_spurious"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionRule:
    """Which tokens to mark. The covariance of a token is (A - mean A)(log p - mean log p), means over the batch.
    "not_spurious" marks all tokens but those of positive advantage, low probability and low entropy."""

    kind: SelectionKind
    fraction: float
    """Share of all eligible tokens of the global batch, at least one; in (0, 1]. For "not_spurious" the largest
    share whose entropy may be low."""
    covariance_range: tuple[float, float] | None = None
    """Only for "random_in_covariance": tokens strictly between the two may be drawn."""
    probability: float | None = None
    """Only for "not_spurious": spurious tokens have a probability below this."""

    @property
    def needs_entropy(self) -> bool:
        """Whether `apply_rule` needs entropies, which rollout engines seldom report."""
        return self.kind in ("highest_entropy", "not_spurious")


class StatsSettings(TypedDict, total=False):
    """Arguments of `token_stats` that a method determines."""

    min_p: float
    """The relative threshold of the filter; this or fixed_tau."""
    fixed_tau: float
    """The absolute threshold of the filter."""
    top_k: int
    """The filter keeps the k likeliest tokens."""
    top_p: float
    """The filter keeps the likeliest tokens that together have this probability."""
    entropy: Literal["grad"]
    """Given if the loss has a gradient through the entropy."""
    filter_entropy: bool
    """Given if the loss has a gradient through the entropy of the filtered distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodNeeds:
    """What a driver must provide to a method, and how it may treat the method's tokens."""

    selection: SelectionRule | None = None
    """Which response tokens of the global batch the driver must mark in LossInputs.selection before the first backward,
    by `apply_rule`. None: the method needs no selection."""
    denominator_counts: Counted = "tokens"
    """What LossInputs.denominator must count over the global batch."""
    acts_without_advantage: bool = False
    """Whether tokens with advantage 0 have a gradient, so that a driver must not leave them out."""
    token_separable: bool = True
    """Whether the loss is a sum over tokens in which no token depends on another one of the micro-batch, so that it may
    be computed a few tokens at a time (`fused_loss`)."""
    proxy_source: ProxySource | None = None
    """Whose filter statistics the method reads: log_z and in_filter of the "current" policy, old_log_z and
    old_in_filter ("old"), or proxy_log_probs ("lagged"). None: the method reads no proxy."""
    needs_proxy_kl: bool = False
    """Whether LossInputs.proxy_kl must be given if the proxy is not that of the policy in training. The driver must
    then store the sparse proxy of the other policy (`token_stats(proxy_rows=...)`) for the tokens that may matter."""
    token_stats: StatsSettings = field(default_factory=StatsSettings)
    """Arguments of `token_stats`: the filter, and entropy="grad" if the loss needs that gradient; empty otherwise."""
