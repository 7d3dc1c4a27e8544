"""A step's rows as the mini-batches of its updates."""

from __future__ import annotations

import numpy as np

from megatron_rl.batching.arrays import Array


def mini_batches(groups: Array, *, updates: int, epochs: int, seed: int) -> list[Array]:
    """For each update, the ascending rows [n] of its mini-batch: whole groups, every row once a pass (epoch).

    The first pass takes the groups in the order they were drawn, later ones in an order of their own, from the seed.

    Args:
        groups: [N], which group each row belongs to.
        updates: a multiple of epochs.
    """
    order = np.unique(groups)
    batches: list[Array] = []
    for epoch in range(epochs):
        if epoch:
            order = np.random.default_rng([seed, epoch]).permutation(np.unique(groups))
        batches += [np.flatnonzero(np.isin(groups, part)) for part in np.array_split(order, updates // epochs)]
    return batches
