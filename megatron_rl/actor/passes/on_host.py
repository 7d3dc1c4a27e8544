"""What micro-batches leave on the device, and how a pass brings it to the host: all at once, after the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

import lpreg
from megatron_rl.actor.passes.copies import to_host
from megatron_rl.actor.passes.micro_batch import MicroBatch
from megatron_rl.actor.passes.results import Table, TrainResult, add_up
from megatron_rl.batching.stored_proxy import StoredProxy

TABLE = ("log_probs", "entropy", "log_z", "in_filter")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a micro-batch of a training step leaves on the device."""

    rows: tuple[int, ...]
    columns: list[Tensor]
    """The columns of TABLE."""
    loss: Tensor
    metrics: Mapping[str, lpreg.Mean]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a micro-batch of scores leaves on the device."""

    batch: MicroBatch
    columns: list[Tensor]
    """The columns of TABLE, on a reporting rank."""
    marked: Tensor | None
    """[R, d], hidden states that predict the marked tokens."""


def _checked(tensors: Sequence[Tensor], checks: Sequence[lpreg.PostponedCheck]) -> list[np.ndarray]:
    """Returns the tensors as arrays, with one copy. Raises ValueError if a check failed."""
    if not checks:
        return to_host(tensors)
    *arrays, failed = to_host([*tensors, torch.stack([check.failed for check in checks])])
    if failed.any():
        raise ValueError(checks[int(failed.argmax())].message())
    return arrays


def train_result(parts: Sequence[Part], checks: Sequence[lpreg.PostponedCheck]) -> TrainResult:
    """Copies everything to the host at once. The gradient norm is not known yet."""
    names = list(parts[0].metrics) if parts else []
    scalars = [
        torch.stack([part.loss.double(), *(value for name in names for value in _sums(part.metrics[name]))])
        for part in parts
    ]
    arrays = _checked([*scalars, *(column for part in parts for column in part.columns)], checks)
    numbers, columns = arrays[: len(parts)], iter(arrays[len(parts) :])
    return TrainResult(
        table=_table([(part.rows, dict(zip(TABLE, islice(columns, len(TABLE)), strict=True))) for part in parts]),
        loss=sum(float(found[0]) for found in numbers),
        metrics=add_up(
            {name: (float(found[1 + 2 * i]), float(found[2 + 2 * i])) for i, name in enumerate(names)}
            for found in numbers
        ),
        grad_norm=float("nan"),
    )


def _sums(mean: lpreg.Mean) -> tuple[Tensor, Tensor]:
    return mean.total.double(), mean.count.double()


def scored_table(parts: Sequence[Scored], entries: Sequence[Tensor], checks: Sequence[lpreg.PostponedCheck]) -> Table:
    """Copies everything to the host at once. entries: counts, ids and log q of the proxy of the marked tokens; none if
    no token is marked."""
    columns = [column for part in parts for column in part.columns]
    arrays = _checked([*columns, *entries], checks)
    found = iter(arrays[: len(columns)])
    table = _table(
        [(part.batch.rows, dict(zip(TABLE, islice(found, len(part.columns)), strict=False))) for part in parts]
    )
    if not entries:
        return table
    counts, ids, log_q = arrays[len(columns) :]
    return replace(table, proxy=StoredProxy(_spread(parts, counts), ids, log_q))


def _spread(parts: Sequence[Scored], counts: np.ndarray) -> np.ndarray:
    """Turns values of the marked tokens of all micro-batches into values of all of their tokens, 0 elsewhere."""
    sizes = [len(part.batch.targets) for part in parts]
    places = [
        part.batch.marked_places + start
        for part, start in zip(parts, np.cumsum(sizes) - sizes, strict=True)
        if part.batch.marked_places is not None
    ]
    of_all = np.zeros(sum(sizes), dtype=counts.dtype)
    of_all[np.concatenate(places)] = counts
    return of_all


def table_of(
    parts: Sequence[tuple[tuple[int, ...], Mapping[str, Tensor]]], checks: Sequence[lpreg.PostponedCheck]
) -> Table:
    """Returns a table of tensors that are still on the device."""
    arrays = iter(_checked([column for _, columns in parts for column in columns.values()], checks))
    return _table([(rows, {name: next(arrays) for name in columns}) for rows, columns in parts])


def _table(parts: list[tuple[tuple[int, ...], dict[str, np.ndarray]]]) -> Table:
    names = parts[0][1] if parts else ()
    return Table(
        rows=np.array([row for rows, _ in parts for row in rows], dtype=np.int64),
        values={name: np.concatenate([columns[name] for _, columns in parts]) for name in names},
    )
