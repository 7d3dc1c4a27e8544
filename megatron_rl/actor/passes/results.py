"""Results that a rank sends to the driver. The driver can read them without importing Megatron."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy

Snapshot = Literal["lagged", "reference"]
"""Name of a copy of the weights that stays in CPU memory between uses."""
Weights = Literal["current"] | Snapshot
Sums = dict[str, tuple[float, float]]
"""Metric name -> (total, count). The mean is taken when all parts have been added up."""


def add_up(parts: Iterable[Sums]) -> Sums:
    """Returns the sums over micro-batches, replicas or updates."""
    sums: Sums = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
    return sums


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Per-token results for some sequences of a batch."""

    rows: np.ndarray
    """[n], indices of the sequences in the batch."""
    values: dict[str, np.ndarray]
    """Name -> values of the sampled tokens of these sequences, flat, in the order of `rows`."""
    proxy: StoredProxy | None = None
    """This rank's part of the proxy distribution for the same tokens, if the batch asked for it."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of an optimizer step on one data-parallel replica."""

    table: Table
    loss: float
    """The replica's part of the loss. The loss is the sum over replicas."""
    metrics: Sums
    grad_norm: float
    """Norm of the whole gradient before clipping, the same on every rank."""


def merge_tables(batch: SequenceBatch, tables: list[Table]) -> tuple[dict[str, np.ndarray], StoredProxy]:
    """Merges tables that cover some sequences each into flat values [T] and one proxy store, in the batch's order."""
    merged: dict[str, np.ndarray] = {}
    proxies = []
    for table in tables:
        for name, values in table.values.items():
            if name not in merged:
                merged[name] = np.empty((batch.num_sampled_tokens, *values.shape[1:]), dtype=values.dtype)
            batch.set_values(merged[name], table.rows, values)
        if table.proxy is not None:
            proxies.append((batch.token_index(table.rows), table.proxy))
    return merged, StoredProxy.join(batch.num_sampled_tokens, proxies)
