"""Lp-Reg's term: which rare tokens are held close to the proxy distribution, and how (arXiv 2510.03222).

The method `lp_reg` puts it on the paper's surrogate, and `with_lp_reg` on any other.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lpreg._torch import torch
from lpreg.losses.base import Mean
from lpreg.losses.inputs import MAX_LOG_RATIO, LossInputs
from lpreg.losses.settings import MethodSettings, NonNegative, Positive, Share, ShareOrZero
from lpreg.needs import MethodNeeds, ProxySource, SelectionKind, SelectionRule, StatsSettings
from lpreg.selection.ranking import select_lowest

if TYPE_CHECKING:
    from torch import Tensor

_RULES: dict[str, SelectionKind] = {"log_prob": "lowest_log_prob", "entropy": "highest_entropy", "random": "random"}
_FILTERS = ("min_p", "fixed_tau", "top_k", "top_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class LpRegTermSettings(MethodSettings):
    """Which tokens are regularised, by which proxy and estimator."""

    rho: Share = 0.01
    """Share of the response tokens that may be regularised, lowest probability first."""
    beta: NonNegative = 1.0
    """Weight of the KL term."""
    min_p: ShareOrZero = 0.02
    """The filter keeps tokens with p >= min_p * max p (kappa in the paper). 0 keeps all tokens (the paper without tau):
    then q = p, so the term has no effect unless the proxy is old or lagged."""
    fixed_tau: Share | None = None
    """If set, replaces min_p: the filter keeps tokens with p >= fixed_tau. A row in which no token does has no proxy
    and is not regularised; the published code pulls it towards the uniform distribution."""
    kl_estimator: Literal["k3", "full", "reverse"] = "k3"
    """full: KL(q || p) over the vocabulary, which is -log Z with the current policy's proxy and LossInputs.proxy_kl
    with another one. On the sampled token, with d = log q - log p: k3 is exp(d) - d - 1, with the current policy's
    proxy an advantage shift of beta * (1/Z - 1); reverse is d^2 / 2, whose gradient is in expectation that of the
    reverse KL(p || q), an advantage shift of beta * log(1/Z)."""
    select_by: Literal["log_prob", "entropy", "random", "all"] = "log_prob"
    """Ranks the tokens of which the share rho is taken: lowest log-prob (the paper), or for its ablations highest
    entropy or at random. all: every token, whatever rho."""
    advantage_sign: Literal["negative", "both"] = "negative"
    """negative: regularises tokens with negative advantage (the paper). both: tokens with positive advantage too."""
    selection_scope: Literal["batch", "micro_batch_negatives"] = "batch"
    """batch: takes the share rho of all response tokens of the global batch. micro_batch_negatives: of the tokens with
    negative advantage in each micro-batch, so the loss depends on how the batch is split."""
    require_below_proxy: bool = False
    """Regularises only tokens with p < q."""
    k3_clamp: Positive | None = None
    """Upper bound of the k3 value. The gradient is 0 beyond it, so a token that fell far is no longer protected.
    Without a bound the gradient ends at p = q exp(-20)."""
    proxy_source: ProxySource = "current"
    """The policy whose filtered distribution q is: the one in training, the one that generated the batch, or a lagged
    copy. old without old_log_probs is current: there is one update per batch."""

    def __post_init__(self) -> None:
        MethodSettings.__post_init__(self)
        negatives_only = self.select_by == "log_prob" and self.advantage_sign == "negative"
        if self.selection_scope == "micro_batch_negatives" and not negatives_only:
            raise ValueError(
                "selection_scope must be 'batch' with another select_by than 'log_prob' or another advantage_sign than "
                f"'negative', got select_by={self.select_by!r} and advantage_sign={self.advantage_sign!r}"
            )

    @property
    def needs(self) -> MethodNeeds:
        rule = None
        if self.selection_scope == "batch" and self.select_by != "all":
            rule = SelectionRule(kind=_RULES[self.select_by], fraction=self.rho)
        # token_stats requires a positive min_p; this one drops only tokens whose probability is 0 in floating point.
        stats: StatsSettings = {"min_p": self.min_p or sys.float_info.min}
        if self.fixed_tau is not None:
            stats = {"fixed_tau": self.fixed_tau}
        return MethodNeeds(
            selection=rule,
            token_separable=self.selection_scope == "batch",
            proxy_source=self.proxy_source,
            needs_proxy_kl=self.kl_estimator == "full" and self.proxy_source != "current",
            token_stats=stats,
        )

    @classmethod
    def replaced(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {} if given.get("fixed_tau") is None else {"min_p": "fixed_tau"}

    def around(self, needs: MethodNeeds) -> MethodNeeds:
        """The needs of a method with this term.

        Raises:
            ValueError: the method has the term already, selects tokens by a rule of its own, or has another filter.
        """
        own = self.needs
        if needs.proxy_source is not None:
            raise ValueError("the method has Lp-Reg's term already")
        if own.selection is not None and needs.selection is not None:
            raise ValueError(
                f"the method selects tokens by a rule of its own, {needs.selection.kind}, and a batch has one "
                "selection; give select_by='all'"
            )
        filters = [{name: stats.get(name) for name in _FILTERS} for stats in (own.token_stats, needs.token_stats)]
        if any(filters[1].values()) and filters[0] != filters[1]:
            raise ValueError(f"the method's filter is {needs.token_stats}, and the term's is {own.token_stats}")
        return replace(
            needs,
            selection=own.selection or needs.selection,
            token_separable=needs.token_separable and own.token_separable,
            proxy_source=own.proxy_source,
            needs_proxy_kl=own.needs_proxy_kl,
            token_stats=needs.token_stats | own.token_stats,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Proxy:
    """The filtered distribution at the sampled tokens; all [T], detached."""

    log_q: Tensor
    """-inf if the token is filtered."""
    in_filter: Tensor
    log_z: Tensor | None
    """None for a lagged proxy, of which only log q is known."""


@dataclass(frozen=True, slots=True)
class LpRegTerm:
    """beta * KL on tokens that are rare, kept by the filter and have negative advantage."""

    settings: LpRegTermSettings

    def acts_on(self, advantages: Tensor) -> Tensor:
        """[T] bool, tokens whose advantage [T] lets the term act."""
        return advantages < 0 if self.settings.advantage_sign == "negative" else advantages != 0

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Mean]]:
        """Returns the term of each token, [T], which is 0 where it does not act, and metrics."""
        counted, proxy, low = inputs.counted, self._proxy(inputs), self._low(inputs)
        regularised = low & proxy.in_filter & self.acts_on(inputs.advantages)
        if self.settings.require_below_proxy:
            regularised &= inputs.log_probs.detach() < proxy.log_q

        # d = log q - log p; 0 on all other tokens, where log q may be -inf and would poison the gradient.
        gap = torch.where(regularised, proxy.log_q - inputs.log_probs, 0.0)
        kl, clamped = self._kl(inputs, gap, regularised)
        metrics = {
            "selected_fraction": Mean.of(regularised, counted),
            "candidate_kept_fraction": Mean.of(proxy.in_filter, low),
            "kl": Mean.of(kl, regularised),
            "advantage_shift": Mean.of(self.settings.beta * self._pull(gap), regularised),
            "clamped_fraction": Mean.of(clamped, regularised),
        }
        if proxy.log_z is not None:
            metrics["selected_one_minus_z"] = Mean.of(-proxy.log_z.expm1(), regularised)
        return self.settings.beta * kl, metrics

    def _proxy(self, inputs: LossInputs) -> _Proxy:
        source = self.settings.proxy_source
        if source == "lagged":
            log_q = _need(inputs.proxy_log_probs, "proxy_log_probs").detach()
            return _Proxy(log_q, log_q > -torch.inf, None)
        log_probs, prefix = inputs.log_probs, ""
        log_z, in_filter = inputs.log_z, inputs.in_filter
        if inputs.old_log_probs is not None and not self._proxy_is_current(inputs):
            log_probs, prefix = inputs.old_log_probs, "old_"
            log_z, in_filter = inputs.old_log_z, inputs.old_in_filter
        log_z = _need(log_z, prefix + "log_z").detach()
        in_filter = _need(in_filter, prefix + "in_filter")
        return _Proxy(torch.where(in_filter, log_probs.detach() - log_z, -torch.inf), in_filter, log_z)

    def _proxy_is_current(self, inputs: LossInputs) -> bool:
        source = self.settings.proxy_source
        return source == "current" or (source == "old" and inputs.old_log_probs is None)

    def _low(self, inputs: LossInputs) -> Tensor:
        """[T] bool, the tokens that are rare enough to be regularised."""
        if self.settings.select_by == "all":
            return inputs.counted
        if self.settings.selection_scope == "batch":
            return _need(inputs.selection, "selection") & inputs.counted
        negative = inputs.counted & (inputs.advantages < 0)
        return select_lowest(inputs.log_probs, negative, self.settings.rho).mask

    def _kl(self, inputs: LossInputs, gap: Tensor, regularised: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the KL term [T], 0 where not regularised, and [T] bool, where the clamp bounds it."""
        if self.settings.kl_estimator == "full":
            current = self._proxy_is_current(inputs)
            kl = -_need(inputs.log_z, "log_z") if current else _need(inputs.proxy_kl, "proxy_kl")
            return torch.where(regularised, kl, 0.0), torch.zeros_like(regularised)
        if self.settings.kl_estimator == "reverse":
            return gap.square() / 2, torch.zeros_like(regularised)
        gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = gap.expm1() - gap
        if self.settings.k3_clamp is None:
            return k3, torch.zeros_like(regularised)
        return k3.clamp(max=self.settings.k3_clamp), k3.detach() > self.settings.k3_clamp

    def _pull(self, gap: Tensor) -> Tensor:
        """[T], what the KL term adds to the advantage of the sampled token, divided by beta; for "full" what k3 would
        add."""
        return gap if self.settings.kl_estimator == "reverse" else gap.clamp(max=MAX_LOG_RATIO).expm1()


def _need(value: Tensor | None, field: str) -> Tensor:
    if value is None:
        raise ValueError(f"lp_reg needs LossInputs.{field}")
    return value
