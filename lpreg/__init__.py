"""Lp-Reg: low-probability regularisation for reinforcement learning with verifiable rewards. Needs torch alone."""

from lpreg.advantages import group_advantages
from lpreg.correction import accepted_sequences, masked_weights, truncated_weights
from lpreg.fused_head import fused_token_stats
from lpreg.fused_loss import fused_loss
from lpreg.losses import (
    LossInputs,
    LossOutput,
    Mean,
    PolicyLoss,
    make_loss,
    reference_kl,
    with_correction,
    with_reference_kl,
)
from lpreg.proxy_store import ProxyStore
from lpreg.rewards import overlong_penalty, uninformative
from lpreg.selection import Selection, SelectionRule, apply_rule, select_highest, select_lowest
from lpreg.token_stats import TokenStats, token_stats

__all__ = [
    "LossInputs",
    "LossOutput",
    "Mean",
    "PolicyLoss",
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
    "reference_kl",
    "select_highest",
    "select_lowest",
    "token_stats",
    "truncated_weights",
    "uninformative",
    "with_correction",
    "with_reference_kl",
]
