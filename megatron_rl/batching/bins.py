"""Groups sequences into micro-batches within a token budget: packed one after another, or padded side by side."""

from __future__ import annotations

import numpy as np

from megatron_rl.batching.arrays import Indices


def first_fit(lengths: Indices, token_budget: int) -> list[list[int]]:
    """Returns indices in bins of at most `token_budget` tokens in total.

    Each sequence, the longest first, goes into the first bin with enough room. A sequence that is longer than the
    budget gets a bin of its own.
    """
    bins: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for index in np.argsort(-lengths, kind="stable").tolist():
        with_room = np.flatnonzero(room[: len(bins)] >= lengths[index])
        if len(with_room):
            place = int(with_room[0])
        else:
            place = len(bins)
            bins.append([])
            room[place] = max(token_budget, lengths[index])
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def length_buckets(lengths: Indices, token_budget: int) -> list[list[int]]:
    """Returns indices in buckets of at most `token_budget` padded tokens: number of sequences times longest sequence.

    Sequences of similar length share a bucket, the longest first. A sequence that is longer than the budget gets a
    bucket of its own.
    """
    buckets: list[list[int]] = []
    capacity = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        if not buckets or len(buckets[-1]) == capacity:
            buckets.append([])
            capacity = max(1, token_budget // int(lengths[index]))
        buckets[-1].append(index)
    return buckets
