"""Length buckets: rows of similar length share a micro-batch, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def length_buckets(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Row indices in micro-batches of at most `token_budget` padded tokens (rows times longest row).

    Longest rows first, so that memory peaks in the first micro-batch. A row longer than the budget goes alone.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    buckets: list[list[int]] = []
    capacity = 0
    for row in order.tolist():
        if not buckets or len(buckets[-1]) == capacity:
            buckets.append([])
            capacity = max(1, token_budget // int(lengths[row]))
        buckets[-1].append(row)
    return buckets


def share_out(lengths: Sequence[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """Micro-batches of every data-parallel rank: buckets, the heaviest first, each to the rank with the least work.

    Buckets hold at most a rank's even part of the tokens, so that a batch that would fit into one is shared too; a rank
    may still get none, when rows are few.
    """
    total = int(np.sum(lengths, dtype=np.int64))
    buckets = length_buckets(lengths, max(1, min(token_budget, -(-total // ranks))))
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for bucket in buckets:
        rank = load.index(min(load))
        shares[rank].append(bucket)
        load[rank] += sum(int(lengths[row]) for row in bucket)
    return shares
