"""Conversion of the published data sets of the Lp-Reg paper to this project's parquet format."""

from .prepare import Prepared, prepare
from .sets import SETS

__all__ = ["SETS", "Prepared", "prepare"]
