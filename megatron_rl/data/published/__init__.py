"""The published sets that the paper uses, from their files into this project's parquet."""

from .prepare import Prepared, prepare
from .sets import SETS

__all__ = ["SETS", "Prepared", "prepare"]
