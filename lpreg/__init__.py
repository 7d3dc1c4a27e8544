"""Lp-Reg: low-probability regularisation for reinforcement learning with verifiable rewards. Needs torch alone.

Importing lpreg needs no torch, so that a machine without it can read the settings of every method; calling its
functions does, and what is defined on top of torch is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lpreg.advantages import group_advantages
from lpreg.correction import accepted_sequences, masked_weights, truncated_weights
from lpreg.losses import (
    LossInputs,
    LossOutput,
    Mean,
    MethodSettings,
    PolicyLoss,
    make_loss,
    reference_kl,
    with_correction,
    with_lp_reg,
    with_rarity_metrics,
    with_reference_kl,
)
from lpreg.needs import MethodNeeds, SelectionRule
from lpreg.rewards import overlong_penalty, uninformative
from lpreg.selection import Selection, apply_rule, select_highest, select_lowest

if TYPE_CHECKING:
    from lpreg.statistics.checks import PostponedCheck, postponed_checks
    from lpreg.statistics.fused_head import fused_token_stats
    from lpreg.statistics.fused_loss import fused_loss
    from lpreg.statistics.proxy_store import ProxyStore
    from lpreg.statistics.token_stats import TokenStats, token_stats

__version__ = "0.1.0"

_ON_FIRST_USE = {
    "PostponedCheck": "lpreg.statistics.checks",
    "postponed_checks": "lpreg.statistics.checks",
    "ProxyStore": "lpreg.statistics.proxy_store",
    "TokenStats": "lpreg.statistics.token_stats",
    "fused_loss": "lpreg.statistics.fused_loss",
    "fused_token_stats": "lpreg.statistics.fused_head",
    "token_stats": "lpreg.statistics.token_stats",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'lpreg' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)


__all__ = [
    "LossInputs",
    "LossOutput",
    "Mean",
    "MethodNeeds",
    "MethodSettings",
    "PolicyLoss",
    "PostponedCheck",
    "ProxyStore",
    "Selection",
    "SelectionRule",
    "TokenStats",
    "accepted_sequences",
    "apply_rule",
    "fused_loss",
    "fused_token_stats",
    "group_advantages",
    "make_loss",
    "masked_weights",
    "overlong_penalty",
    "postponed_checks",
    "reference_kl",
    "select_highest",
    "select_lowest",
    "token_stats",
    "truncated_weights",
    "uninformative",
    "with_correction",
    "with_lp_reg",
    "with_rarity_metrics",
    "with_reference_kl",
]
