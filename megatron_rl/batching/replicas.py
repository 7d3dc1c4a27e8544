"""What each data-parallel replica gets of a batch: its own sequences, divided into micro-batches.

Only the replica's last pipeline stage needs the values of the sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from megatron_rl.batching.arrays import Indices
from megatron_rl.batching.balance import row_costs
from megatron_rl.batching.packing import PackingForm
from megatron_rl.batching.partition import MicroBatches, partition, partition_trees
from megatron_rl.batching.sequences import SequenceBatch


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaBatch:
    """The part of a batch that one replica trains on or scores."""

    replica: int
    sequences: SequenceBatch
    rows: Indices
    """Index in the whole batch of each of the sequences."""
    micro_batches: MicroBatches
    """Indices of `sequences`."""

    def without_values(self) -> ReplicaBatch:
        """Returns the part for the stages before the last one. They run tokens through layers and read no values, since
        losses and scores are computed on the last stage."""
        return replace(self, sequences=replace(self.sequences, values={}, proxy=None))


Batch: TypeAlias = SequenceBatch | ReplicaBatch
"""A whole batch, of which every replica takes its part, or that part."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a batch is divided over replicas and micro-batches: `partition` explains the fields."""

    replicas: int
    rows: PackingForm
    token_budget: int
    even_length: float
    count_multiple: int = 1
    same_count: bool = False

    def divide(self, batch: SequenceBatch) -> Iterator[ReplicaBatch]:
        """Yields the part of every replica, one at a time: together they are as large as the batch."""
        return (_part(batch, replica, share) for replica, share in enumerate(self._shares(batch)))

    def part_of(self, batch: SequenceBatch, replica: int) -> ReplicaBatch:
        """Returns the part of one replica."""
        return _part(batch, replica, self._shares(batch)[replica])

    def _shares(self, batch: SequenceBatch) -> list[MicroBatches]:
        settings: dict[str, Any] = dict(
            token_budget=self.token_budget, count_multiple=self.count_multiple, same_count=self.same_count
        )
        if self.rows == "prefix_tree":
            return partition_trees(batch.sequences, self.replicas, even_length=self.even_length, **settings)
        costs, packed = row_costs(batch.lengths, self.even_length), self.rows == "packed"
        return partition(batch.lengths.tolist(), self.replicas, packed=packed, costs=costs, **settings)


def _part(batch: SequenceBatch, replica: int, share: MicroBatches) -> ReplicaBatch:
    rows = np.array(sorted(row for micro_batch in share for row in micro_batch), dtype=np.int64)
    place = np.full(len(batch), -1)
    place[rows] = np.arange(len(rows))
    local = [place[micro_batch].tolist() for micro_batch in share]
    return ReplicaBatch(replica, batch.take(rows), rows, local)
