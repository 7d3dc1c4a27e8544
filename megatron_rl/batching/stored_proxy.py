"""The sparse proxy distribution of another policy as arrays: what the driver holds of a `lpreg.ProxyStore`.

The arrays are small (a few entries for each of a few tokens) and do not depend on the actor's layout, so sequences may
be trained by other ranks than those that scored them. Legend: T tokens, E entries of all tokens together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rl.batching.arrays import Indices


@dataclass(frozen=True, eq=False)
class StoredProxy:
    """log q of the vocabulary entries inside the filter, for each sampled token that has it stored."""

    counts: npt.NDArray[np.int64]
    """[T], number of entries of each token; 0 if nothing is stored for the token."""
    ids: npt.NDArray[np.int32]
    """[E], vocabulary ids of the entries, token after token."""
    log_q: npt.NDArray[np.float32]
    """[E], log q of the entries."""

    def take(self, tokens: Indices) -> StoredProxy:
        """Returns the entries of the given tokens, in the given order."""
        counts = self.counts[tokens]
        starts = np.cumsum(self.counts) - self.counts
        begins = np.cumsum(counts) - counts
        entries = np.repeat(starts[tokens] - begins, counts) + np.arange(counts.sum())
        return StoredProxy(counts, self.ids[entries], self.log_q[entries])

    def where(self, mask: npt.NDArray[np.bool_]) -> StoredProxy:
        """Returns a store without the entries of tokens outside the mask [T]."""
        entries = np.repeat(mask, self.counts)
        return StoredProxy(np.where(mask, self.counts, 0), self.ids[entries], self.log_q[entries])

    @classmethod
    def join(cls, num_tokens: int, parts: Sequence[tuple[Indices, StoredProxy]]) -> StoredProxy:
        """Joins parts, each (indices of its tokens, their entries), into one store of `num_tokens` tokens.

        The entries of one token may be split over several parts; they keep the order of the parts.
        """
        token = [np.repeat(tokens, part.counts) for tokens, part in parts]
        ids, log_q = [part.ids for _, part in parts], [part.log_q for _, part in parts]
        of_entry = np.concatenate([np.zeros(0, dtype=np.int64), *token])
        order = np.argsort(of_entry, kind="stable")
        return cls(
            np.bincount(of_entry, minlength=num_tokens),
            np.concatenate([np.zeros(0, dtype=np.int32), *ids])[order],
            np.concatenate([np.zeros(0, dtype=np.float32), *log_q])[order],
        )
