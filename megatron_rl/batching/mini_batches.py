"""Splits the sequences of a step into the mini-batches of its updates."""

from __future__ import annotations

import numpy as np

from megatron_rl.batching.arrays import Array


def mini_batches(groups: Array, *, updates: int, epochs: int, seed: int) -> list[Array]:
    """Returns, for each update, the ascending indices [n] of the sequences in its mini-batch.

    A mini-batch holds complete groups, and every epoch covers each sequence once. The first epoch takes the groups in
    the order in which they were drawn; each later epoch shuffles them, depending on the seed.

    Args:
        groups: [N], number of the group that each sequence belongs to.
        updates: Number of updates over all epochs, a multiple of `epochs`.
        epochs: Number of passes over the sequences.
        seed: Seed of the shuffled orders.
    """
    order = np.unique(groups)
    batches: list[Array] = []
    for epoch in range(epochs):
        if epoch:
            order = np.random.default_rng([seed, epoch]).permutation(np.unique(groups))
        batches += [np.flatnonzero(np.isin(groups, part)) for part in np.array_split(order, updates // epochs)]
    return batches
