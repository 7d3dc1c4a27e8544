"""Policy losses: one file per method, found by name through `make_loss`. Importing them needs no torch."""

from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.corrected import with_correction
from lpreg.losses.inputs import LossInputs
from lpreg.losses.rarity import with_rarity_metrics
from lpreg.losses.reference_kl import reference_kl, with_reference_kl
from lpreg.losses.registry import make_loss
from lpreg.losses.settings import MethodSettings
from lpreg.losses.with_lp_reg import with_lp_reg

__all__ = [
    "LossInputs",
    "LossOutput",
    "Mean",
    "MethodSettings",
    "PolicyLoss",
    "make_loss",
    "reference_kl",
    "with_correction",
    "with_lp_reg",
    "with_rarity_metrics",
    "with_reference_kl",
]
