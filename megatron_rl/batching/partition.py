"""Partition of a batch into micro-batches per data-parallel rank.

The result is deterministic, so every rank computes the partition of all ranks without communication. Legend: N
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rl.batching.arrays import Indices
from megatron_rl.batching.balance import balanced, row_costs
from megatron_rl.batching.bins import first_fit, length_buckets
from megatron_rl.batching.prefix_tree import PrefixTree
from megatron_rl.types import Ids

Costs = npt.NDArray[np.float64]

PARTS = 4
"""Sequences with a common prefix stay together in runs of at most 1 / PARTS of a micro-batch and of a rank's share of
the tokens. Larger runs could not be balanced over ranks."""

MicroBatches = list[list[int]]
"""Sequence indices of each micro-batch. An empty micro-batch exists only so that its rank takes part in a forward pass
that other ranks need."""


def partition(
    lengths: Sequence[int],
    ranks: int,
    *,
    token_budget: int,
    packed: bool = True,
    costs: Costs | None = None,
    count_multiple: int = 1,
    same_count: bool = False,
) -> list[MicroBatches]:
    """Returns the micro-batches of every data-parallel rank, the largest first, so that memory peaks at the start.

    Each micro-batch holds at most `token_budget` tokens; a longer sequence gets a micro-batch of its own. A rank can
    get none if there are few sequences.

    Args:
        lengths: [N], number of tokens of each sequence.
        ranks: Number of data-parallel ranks.
        token_budget: Limit of the sum of lengths if `packed`, else of number of sequences times longest sequence.
        packed: Whether sequences are packed one after another; else they are padded side by side.
        costs: [N], costs to balance over ranks; the lengths if None. Padded micro-batches are balanced by their padded
            size instead.
        count_multiple: The number of micro-batches of each rank is a multiple of this, with empty ones added.
        same_count: Whether all ranks get the same number of micro-batches.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    costs = tokens.astype(np.float64) if costs is None else costs
    shares = _packed(tokens, ranks, token_budget, costs) if packed else _padded(tokens, ranks, token_budget)
    most = max(len(share) for share in shares)
    return [
        _completed(tokens, share, -(-(most if same_count else len(share)) // count_multiple) * count_multiple)
        for share in shares
    ]


def partition_trees(
    rows: Sequence[Ids], ranks: int, *, token_budget: int, even_length: float | None = None, **counts: Any
) -> list[MicroBatches]:
    """Partitions packed sequences that share the positions of common prefixes (see `partition`). Sequences with a
    common prefix stay together as far as budget and balance allow.

    Args:
        rows: N arrays, the tokens of each sequence.
        ranks: Number of data-parallel ranks.
        token_budget: Largest number of tokens of a micro-batch.
        even_length: See `row_costs`.
        counts: `count_multiple` and `same_count` of `partition`.
    """
    tree = PrefixTree.of(rows)
    runs = tree.runs(max(1, min(token_budget, -(-tree.size // ranks)) // PARTS))
    seen = row_costs(tree.lengths, even_length)
    again = row_costs(tree.shared, even_length)
    costs = np.array([(seen[run] - again[run]).sum() + again[run.start] for run in runs])
    sizes = [int(tree.own[run].sum() + tree.shared[run.start]) for run in runs]
    shares = partition(sizes, ranks, token_budget=token_budget, costs=costs, **counts)
    return [[sorted(int(row) for i in part for row in tree.order[runs[i]]) for part in share] for share in shares]


def _completed(tokens: Indices, share: MicroBatches, count: int) -> MicroBatches:
    """Sorts the micro-batches, the largest first, and appends empty ones up to `count`."""
    ordered = sorted(map(sorted, share), key=lambda rows: (-int(tokens[rows].sum()), rows))
    return ordered + [[] for _ in range(count - len(share))]


def _packed(tokens: Indices, ranks: int, budget: int, costs: Costs) -> list[MicroBatches]:
    """Balances sequences over ranks by cost, then splits each rank's sequences into as few micro-batches as the budget
    allows, and balances these by tokens."""
    shares = []
    for rows in balanced(costs, ranks):
        bins = [[rows[i] for i in bin_] for bin_ in first_fit(tokens[rows], budget)]
        level = [[rows[i] for i in part] for part in balanced(tokens[rows].astype(np.float64), len(bins))]
        shares.append(level if all(tokens[part].sum() <= budget for part in level) else bins)
    return shares


def _padded(tokens: Indices, ranks: int, budget: int) -> list[MicroBatches]:
    """Groups sequences of similar length into micro-batches, then balances these over ranks by padded size.

    A micro-batch holds at most an even share of the tokens per rank, so that a batch that would fit into one
    micro-batch is still split over the ranks.
    """
    buckets = length_buckets(tokens, max(1, min(budget, -(-int(tokens.sum()) // ranks))))
    sizes = np.array([len(bucket) * tokens[bucket].max() for bucket in buckets], dtype=np.float64)
    return [[buckets[i] for i in part] for part in balanced(sizes, ranks)]
