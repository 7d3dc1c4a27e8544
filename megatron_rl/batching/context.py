"""Context parallelism: which tokens of a sequence each rank holds.

A sequence is cut into twice as many chunks as there are ranks. Rank r holds chunk r and chunk r from the end. Late
chunks attend to more tokens than early ones, so this pairing gives every rank the same amount of attention. Megatron's
rotary embedding and Transformer Engine's attention expect this order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.batching.arrays import Indices


def chunk_multiple(ranks: int) -> int:
    """Returns the number that the padded length of each sequence must be a multiple of."""
    return 2 * ranks if ranks > 1 else 1


def held_by(rank: int, ranks: int, lengths: Sequence[int]) -> Indices:
    """Returns the indices of the tokens that `rank` holds, in its order, in sequences of these lengths one after
    another.

    Raises:
        ValueError: a length is not a multiple of `chunk_multiple(ranks)`.
    """
    if ranks == 1:
        return np.arange(sum(lengths))
    parts = []
    start = 0
    for length in lengths:
        if length % chunk_multiple(ranks):
            raise ValueError(f"a sequence of {length} tokens cannot be cut into {chunk_multiple(ranks)} chunks")
        chunk = np.arange(length // chunk_multiple(ranks))
        for number in (rank, 2 * ranks - 1 - rank):
            parts.append(start + number * len(chunk) + chunk)
        start += length
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
