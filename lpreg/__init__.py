"""Lp-Reg: low-probability regularisation for reinforcement learning with verifiable rewards. Needs torch alone."""

from lpreg.advantages import group_advantages
from lpreg.losses import LossInputs, LossOutput, Mean, PolicyLoss, make_loss
from lpreg.selection import Selection, SelectionRule, apply_rule, select_highest, select_lowest
from lpreg.token_stats import TokenStats, token_stats

__all__ = [
    "LossInputs",
    "LossOutput",
    "Mean",
    "PolicyLoss",
    "Selection",
    "SelectionRule",
    "TokenStats",
    "apply_rule",
    "group_advantages",
    "make_loss",
    "select_highest",
    "select_lowest",
    "token_stats",
]
