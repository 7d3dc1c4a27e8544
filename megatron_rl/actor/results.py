"""What a rank sends back to the driver, which need not import Megatron to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Weights = Literal["current", "lagged"]


@dataclass(frozen=True, slots=True)
class Table:
    """Per-token results of some rows of a batch."""

    rows: np.ndarray
    """[n], which rows."""
    values: dict[str, np.ndarray]
    """Name -> flat over the response tokens of those rows, in the order of `rows`."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """An optimizer step as one data-parallel replica saw it."""

    table: Table
    loss: float
    """The replica's part of the loss; the parts add up."""
    metrics: dict[str, tuple[float, float]]
    """Name -> (total, count); both add up over replicas."""
    grad_norm: float
    """Of the whole gradient, before clipping; the same on every rank."""
