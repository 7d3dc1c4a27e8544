"""Lp-Reg: protects rare tokens that pass the filter of the proxy distribution (arXiv 2510.03222, equation 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lpreg._torch import torch
from lpreg.aggregation import token_mean
from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs
from lpreg.losses.lp_reg_term import LpRegTerm, LpRegTermSettings
from lpreg.losses.settings import NonNegative, ShareOrZero

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LpRegSettings(LpRegTermSettings):
    """The regularisation term: which tokens, which proxy, which estimator; and the bounds of the ratio."""

    clip_low: ShareOrZero = 1.0
    """The ratio counts down to 1 - clip_low if the advantage is negative."""
    clip_high: NonNegative = 9.0
    """The ratio counts up to 1 + clip_high (U in the paper)."""
    clip_negative_upper: bool = True
    """The upper bound applies to negative advantages too, as in the paper. False: only to positive ones, as in PPO."""


# U = 10: the ratio is clipped to [0, 10].
_SHARED: dict[str, Any] = {"rho": 0.01, "beta": 1.0, "min_p": 0.02, "clip_low": 1.0, "clip_high": 9.0}

PRESETS: dict[str, dict[str, Any]] = {
    # Equation 6 on-policy. rho is that of the 14B model; the 32B run used 0.005.
    "paper": _SHARED
    | {
        "kl_estimator": "full",
        "selection_scope": "batch",
        "require_below_proxy": False,
        "k3_clamp": None,
        "clip_negative_upper": True,
    },
    # The rules of the published scripts without their accidents: a small micro-batch still selects, target and log-prob
    # come from one forward, the filter follows the temperature, the mean is exact.
    "reference": _SHARED
    | {
        "kl_estimator": "k3",
        "proxy_source": "old",
        "selection_scope": "micro_batch_negatives",
        "require_below_proxy": True,
        "k3_clamp": 10.0,
        "clip_negative_upper": False,
    },
}


class LpReg(PolicyLoss):
    """-clip(r, 0, U) A, plus beta * KL on tokens that are rare, kept by the filter and have negative advantage.

    The paper's ablations are settings: select_by="entropy" | "random" | "all" (all negatives), advantage_sign="both",
    kl_estimator="reverse", min_p=0 (no tau), fixed_tau.
    """

    name = "lp_reg"
    Settings = LpRegSettings
    settings: LpRegSettings
    presets: ClassVar = PRESETS

    def uses_proxy(self, advantages: Tensor) -> Tensor:
        return LpRegTerm(self.settings).acts_on(advantages)

    def __call__(self, inputs: LossInputs) -> LossOutput:
        counted, ratio = inputs.counted, inputs.ratio
        term, metrics = LpRegTerm(self.settings)(inputs)
        bounded = self._bounded_ratio(ratio, inputs.advantages)
        loss = token_mean(-inputs.advantages * bounded + term, counted, inputs.denominator)
        of_ratio = {
            "ratio": Mean.of(ratio, counted),
            "clip_fraction": Mean.of((bounded != ratio) & (inputs.advantages != 0), counted),
        }
        return LossOutput(loss, of_ratio | metrics)

    def _bounded_ratio(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        low, high = 1 - self.settings.clip_low, 1 + self.settings.clip_high
        bounded = torch.where(advantages < 0, ratio.clamp(min=low), ratio)
        if self.settings.clip_negative_upper:
            return bounded.clamp(max=high)
        return torch.where(advantages < 0, bounded, bounded.clamp(max=high))
