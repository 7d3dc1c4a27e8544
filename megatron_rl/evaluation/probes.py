"""Positions at which an evaluation follows the probability of one token."""

from __future__ import annotations

import numpy as np

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch


def follows(batch: SequenceBatch, token: int) -> Array:
    """Returns bool [T], True for sampled tokens that come right after `token`."""
    return np.asarray(batch.token_ids[np.flatnonzero(batch.sampled_mask) - 1] == token)


def probe_rows(batch: SequenceBatch, after: int, token: int) -> tuple[SequenceBatch, Array]:
    """Returns the sequences in which some sampled token comes after `after`, to be scored for `token`, and bool [T]:
    the sampled tokens of these sequences that do."""
    place = follows(batch, after)
    chosen = np.unique(batch.per_token(np.arange(len(batch)))[place])
    part = batch.take(chosen)
    return part.with_values(probe_targets=np.full(part.num_sampled_tokens, token)), place[batch.token_index(chosen)]
