"""Lp-Reg: keeps rare tokens that the filtered policy still holds for plausible (arXiv 2510.03222, equation 6)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lpreg.aggregation import token_mean
from lpreg.losses.base import (
    LossInputs,
    LossOutput,
    Mean,
    PolicyLoss,
    ProxySource,
    StatsSettings,
    check_choice,
    check_range,
)
from lpreg.selection import SelectionKind, SelectionRule, select_lowest

_RULES: dict[str, SelectionKind] = {"log_prob": "lowest_log_prob", "entropy": "highest_entropy", "random": "random"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LpRegSettings:
    kl_estimator: Literal["k3", "full", "reverse"] = "k3"
    """"full": KL(q || p) over the vocabulary: -log Z with the current policy's proxy, else LossInputs.proxy_kl. On the
    sampled token, with d = log q - log p: "k3" is exp(d) - d - 1, with the current policy's proxy an advantage shift of
    beta * (1/Z - 1); "reverse" is d^2 / 2, whose gradient is in expectation that of the reverse KL(p || q), an
    advantage shift of beta * log(1/Z)."""
    select_by: Literal["log_prob", "entropy", "random", "all"] = "log_prob"
    """What makes a token one of the share rho: a low log-prob (the paper), or for its ablations a high entropy or
    chance. "all": every token, whatever rho."""
    advantage_sign: Literal["negative", "both"] = "negative"
    """Regularise tokens of negative advantage (the paper), or of positive advantage too."""
    rho: float = 0.01
    """Share of tokens that may be regularised."""
    beta: float = 1.0
    """Weight of the KL term."""
    min_p: float = 0.02
    """The filter keeps tokens with p >= min_p * max p (kappa in the paper). 0 keeps all (the paper without tau): q = p,
    so there is nothing to regularise unless the proxy is old or lagged."""
    fixed_tau: float | None = None
    """If set, the filter keeps tokens with p >= fixed_tau instead."""
    clip_low: float = 1.0
    """The ratio counts down to 1 - clip_low where the advantage is negative."""
    clip_high: float = 9.0
    """The ratio counts up to 1 + clip_high (U in the paper)."""
    clip_negative_upper: bool = True
    """The upper bound holds for negative advantages too, as in the paper. False: only for positive ones, as in PPO."""
    selection_scope: Literal["batch", "micro_batch_negatives"] = "batch"
    """"batch": the lowest rho of all response tokens of the global batch. "micro_batch_negatives": of the tokens of
    negative advantage in the micro-batch at hand, so the loss depends on how the batch is split."""
    require_below_proxy: bool = False
    """Regularise only tokens with p < q."""
    k3_clamp: float | None = None
    """Upper bound of the k3 value. The gradient is 0 beyond it, so a token that fell far is no longer protected."""
    proxy_source: ProxySource = "current"
    """Whose filtered distribution q is: of the policy being trained, of the one that generated the batch, of a lagged
    copy. "old" without old_log_probs is "current": one update per batch."""

    def __post_init__(self) -> None:
        check_choice("kl_estimator", self.kl_estimator, ("k3", "full", "reverse"))
        check_choice("select_by", self.select_by, (*_RULES, "all"))
        check_choice("advantage_sign", self.advantage_sign, ("negative", "both"))
        check_choice("selection_scope", self.selection_scope, ("batch", "micro_batch_negatives"))
        check_choice("proxy_source", self.proxy_source, ("current", "old", "lagged"))
        check_range("rho", self.rho, 0.0, 1.0, open_low=True)
        check_range("beta", self.beta, 0.0, math.inf)
        check_range("min_p", self.min_p, 0.0, 1.0)
        check_range("clip_low", self.clip_low, 0.0, 1.0)
        check_range("clip_high", self.clip_high, 0.0, math.inf)
        if self.fixed_tau is not None:
            check_range("fixed_tau", self.fixed_tau, 0.0, 1.0, open_low=True)
        if self.k3_clamp is not None:
            check_range("k3_clamp", self.k3_clamp, 0.0, math.inf, open_low=True)
        negatives_only = self.select_by == "log_prob" and self.advantage_sign == "negative"
        if self.selection_scope == "micro_batch_negatives" and not negatives_only:
            raise ValueError(
                "selection_scope must be 'batch' with another select_by than 'log_prob' or another advantage_sign than "
                f"'negative', got select_by={self.select_by!r} and advantage_sign={self.advantage_sign!r}"
            )


@dataclass(frozen=True, slots=True)
class _Proxy:
    """The filtered distribution at the sampled tokens; all [T], detached."""

    log_q: Tensor
    """-inf where filtered."""
    kept: Tensor
    log_z: Tensor | None
    """None for a lagged proxy, which is known only through log q."""


class LpReg(PolicyLoss):
    """-clip(r, 0, U) A, plus beta * KL on tokens that are rare, kept by the filter and of negative advantage.

    The paper's ablations are settings: select_by="entropy" | "random" | "all" (all negatives), advantage_sign="both",
    kl_estimator="reverse", min_p=0 (no tau), fixed_tau.
    """

    name = "lp_reg"
    Settings = LpRegSettings
    settings: LpRegSettings

    @property
    def selection(self) -> SelectionRule | None:
        if self.settings.selection_scope != "batch" or self.settings.select_by == "all":
            return None
        return SelectionRule(kind=_RULES[self.settings.select_by], fraction=self.settings.rho)

    @property
    def token_separable(self) -> bool:
        return self.settings.selection_scope == "batch"

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        return advantages < 0 if self.settings.advantage_sign == "negative" else advantages != 0

    @property
    def proxy_source(self) -> ProxySource:
        return self.settings.proxy_source

    @property
    def needs_proxy_kl(self) -> bool:
        return self.settings.kl_estimator == "full" and self.settings.proxy_source != "current"

    def token_stats_kwargs(self) -> StatsSettings:
        if self.settings.fixed_tau is not None:
            return {"fixed_tau": self.settings.fixed_tau}
        # token_stats wants a positive min_p; this one drops only what has no probability in any floating point.
        return {"min_p": self.settings.min_p or sys.float_info.min}

    def __call__(self, inputs: LossInputs) -> LossOutput:
        counted, ratio = inputs.counted, inputs.ratio
        proxy = self._proxy(inputs)
        low = self._low(inputs)
        regularised = low & proxy.kept & self.uses_proxy(inputs.advantages)
        if self.settings.require_below_proxy:
            regularised &= inputs.log_probs.detach() < proxy.log_q

        # d = log q - log p; 0 on all other tokens, where log q may be -inf and would poison the gradient.
        gap = torch.where(regularised, proxy.log_q - inputs.log_probs, 0.0)
        kl, clamped = self._kl(inputs, gap, regularised)
        bounded = self._bounded_ratio(ratio, inputs.advantages)
        loss = token_mean(-inputs.advantages * bounded + self.settings.beta * kl, counted, inputs.denominator)
        metrics = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of((bounded != ratio) & (inputs.advantages != 0), counted),
            "selected_fraction": Mean.of(regularised, counted),
            "candidate_kept_fraction": Mean.of(proxy.kept, low),
            "kl": Mean.of(kl, regularised),
            "advantage_shift": Mean.of(self.settings.beta * self._pull(gap), regularised),
            "clamped_fraction": Mean.of(clamped, regularised),
        }
        if proxy.log_z is not None:
            metrics["selected_one_minus_z"] = Mean.of(-proxy.log_z.expm1(), regularised)
        return LossOutput(loss, metrics)

    def _proxy(self, inputs: LossInputs) -> _Proxy:
        source = self.settings.proxy_source
        if source == "lagged":
            log_q = self.need(inputs.proxy_log_probs, "proxy_log_probs").detach()
            return _Proxy(log_q, log_q > -torch.inf, None)
        log_probs, prefix = inputs.log_probs, ""
        log_z, kept = inputs.log_z, inputs.kept
        if inputs.old_log_probs is not None and not self._proxy_is_current(inputs):
            log_probs, prefix = inputs.old_log_probs, "old_"
            log_z, kept = inputs.old_log_z, inputs.old_kept
        log_z = self.need(log_z, prefix + "log_z").detach()
        kept = self.need(kept, prefix + "kept")
        return _Proxy(torch.where(kept, log_probs.detach() - log_z, -torch.inf), kept, log_z)

    def _proxy_is_current(self, inputs: LossInputs) -> bool:
        source = self.settings.proxy_source
        return source == "current" or (source == "old" and inputs.old_log_probs is None)

    def _low(self, inputs: LossInputs) -> Tensor:
        """[T] bool, the tokens rare enough to be regularised."""
        if self.settings.select_by == "all":
            return inputs.counted
        if self.settings.selection_scope == "batch":
            return self.need(inputs.selection, "selection") & inputs.counted
        negative = inputs.counted & (inputs.advantages < 0)
        return select_lowest(inputs.log_probs, negative, self.settings.rho).mask

    def _kl(self, inputs: LossInputs, gap: Tensor, regularised: Tensor) -> tuple[Tensor, Tensor]:
        """([T] the KL term, 0 where not regularised; [T] bool, where the clamp cut it)."""
        if self.settings.kl_estimator == "full":
            if self._proxy_is_current(inputs):
                kl = -self.need(inputs.log_z, "log_z")
            else:
                kl = self.need(inputs.proxy_kl, "proxy_kl")
            return torch.where(regularised, kl, 0.0), torch.zeros_like(regularised)
        if self.settings.kl_estimator == "reverse":
            return gap.square() / 2, torch.zeros_like(regularised)
        k3 = gap.expm1() - gap
        if self.settings.k3_clamp is None:
            return k3, torch.zeros_like(regularised)
        return k3.clamp(max=self.settings.k3_clamp), k3.detach() > self.settings.k3_clamp

    def _pull(self, gap: Tensor) -> Tensor:
        """[T] what the KL term adds to the advantage of the sampled token, over beta; for "full" what k3 would add."""
        return gap if self.settings.kl_estimator == "reverse" else gap.expm1()

    def _bounded_ratio(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        low, high = 1 - self.settings.clip_low, 1 + self.settings.clip_high
        bounded = torch.where(advantages < 0, ratio.clamp(min=low), ratio)
        if self.settings.clip_negative_upper:
            return bounded.clamp(max=high)
        return torch.where(advantages < 0, bounded, bounded.clamp(max=high))
