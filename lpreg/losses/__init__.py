"""Policy losses: one method a file, found by name through `make_loss`."""

from lpreg.losses.base import LossInputs, LossOutput, Mean, PolicyLoss, ProxySource
from lpreg.losses.corrected import with_correction
from lpreg.losses.reference_kl import reference_kl, with_reference_kl
from lpreg.losses.registry import make_loss

__all__ = [
    "LossInputs",
    "LossOutput",
    "Mean",
    "PolicyLoss",
    "ProxySource",
    "make_loss",
    "reference_kl",
    "with_correction",
    "with_reference_kl",
]
