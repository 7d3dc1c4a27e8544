"""What a rank sends back to the driver, which need not import Megatron to read it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_rl.batching.stored_proxy import StoredProxy

Snapshot = Literal["lagged", "reference"]
"""Weights that wait on the CPU between uses."""
Weights = Literal["current"] | Snapshot
Sums = dict[str, tuple[float, float]]
"""Metric name -> (total, count), a mean that is still open."""


def add_up(parts: Iterable[Sums]) -> Sums:
    """The sums of micro-batches, or of replicas, as one."""
    whole: Sums = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = (before[0] + total, before[1] + count)
    return whole


@dataclass(frozen=True, slots=True)
class Table:
    """Per-token results of some rows of a batch."""

    rows: np.ndarray
    """[n], which rows."""
    values: dict[str, np.ndarray]
    """Name -> flat over the response tokens of those rows, in the order of `rows`."""
    proxy: StoredProxy | None = None
    """This rank's part of it over those tokens, where rows asked for it to be stored."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """An optimizer step as one data-parallel replica saw it."""

    table: Table
    loss: float
    """The replica's part of the loss; the parts add up."""
    metrics: Sums
    grad_norm: float
    """Of the whole gradient, before clipping; the same on every rank."""
