"""Context parallelism: which tokens of a row each rank holds.

A row is cut into twice as many chunks as there are ranks, and rank r holds chunk r and the r-th from the end: the late
chunks look at more tokens than the early ones, and so every rank has as much attention to do. This is the order that
Megatron's rotary embedding and Transformer Engine's attention expect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.batching.arrays import Indices


def chunk_multiple(ranks: int) -> int:
    """What the length of a row must be a multiple of, padding included."""
    return 2 * ranks if ranks > 1 else 1


def held_by(rank: int, ranks: int, lengths: Sequence[int]) -> Indices:
    """Where the tokens of `rank`, in its order, lie in rows of these lengths laid one after another."""
    if ranks == 1:
        return np.arange(sum(lengths))
    parts = []
    start = 0
    for length in lengths:
        if length % chunk_multiple(ranks):
            raise ValueError(f"a row of {length} tokens cannot be cut into {chunk_multiple(ranks)} chunks")
        chunk = np.arange(length // chunk_multiple(ranks))
        for number in (rank, 2 * ranks - 1 - rank):
            parts.append(start + number * len(chunk) + chunk)
        start += length
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
