"""Which rows go together, and to which data-parallel rank. Deterministic: every rank computes all shares alike."""

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
"""Rows that begin alike go together in runs of at most such a part of a micro-batch, and of a rank's rows: larger ones
could not be shared out evenly."""

MicroBatches = list[list[int]]
"""Row indices of each. An empty one has something to do only where all ranks must take part in every forward."""


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
    """Micro-batches of every data-parallel rank, the largest first, so that memory peaks at once.

    Each holds at most `token_budget` tokens: the sum of its rows' lengths when `packed`, else rows times longest row;
    a longer row goes alone. A rank gets none when rows are few.

    Args:
        lengths: [N] tokens of each row.
        costs: [N], what the balance over ranks is about; None: the lengths. Padded rows go by their padded size.
        count_multiple: every rank's number of micro-batches is a multiple of this, with empty ones where needed.
        same_count: ... and the same on every rank.
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
    """As `partition` packed, of rows that share positions where they begin alike: those stay together as far as budget
    and balance allow.

    Args:
        rows: N arrays, the tokens of each.
        even_length: as in `row_costs`.
        counts: `count_multiple` and `same_count`.
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
    """Largest first; and empty ones at the end, if there must be more of them."""
    ordered = sorted(map(sorted, share), key=lambda rows: (-int(tokens[rows].sum()), rows))
    return ordered + [[] for _ in range(count - len(share))]


def _packed(tokens: Indices, ranks: int, budget: int, costs: Costs) -> list[MicroBatches]:
    """Rows to ranks by what they cost; then, on each, as few micro-batches as the budget allows, made level."""
    shares = []
    for rows in balanced(costs, ranks):
        bins = [[rows[i] for i in bin_] for bin_ in first_fit(tokens[rows], budget)]
        level = [[rows[i] for i in part] for part in balanced(tokens[rows].astype(np.float64), len(bins))]
        shares.append(level if all(tokens[part].sum() <= budget for part in level) else bins)
    return shares


def _padded(tokens: Indices, ranks: int, budget: int) -> list[MicroBatches]:
    """Rows of similar length together, then micro-batches to ranks by their padded size. They hold at most a rank's
    even part of the tokens, so that a batch that would fit into one is shared too."""
    buckets = length_buckets(tokens, max(1, min(budget, -(-int(tokens.sum()) // ranks))))
    sizes = np.array([len(bucket) * tokens[bucket].max() for bucket in buckets], dtype=np.float64)
    return [[buckets[i] for i in part] for part in balanced(sizes, ranks)]
