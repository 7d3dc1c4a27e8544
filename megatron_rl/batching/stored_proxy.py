"""The sparse proxy of another policy on its way through the driver: `lpreg.ProxyStore` as arrays.

It is small (a few entries for each of a few tokens) and knows nothing of the actor's layout, so rows may go to other
ranks than those that scored them. Legend: T tokens, E entries of all tokens together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rl.batching.arrays import Indices


@dataclass(frozen=True)
class StoredProxy:
    """log q of the tokens inside the filter, for each response token that has it stored."""

    counts: npt.NDArray[np.int64]
    """[T], entries of each token; 0 where none is stored."""
    ids: npt.NDArray[np.int32]
    """[E], token ids, token after token."""
    log_q: npt.NDArray[np.float32]
    """[E]."""

    def take(self, tokens: Indices) -> StoredProxy:
        """The given tokens in the given order."""
        counts = self.counts[tokens]
        starts = np.cumsum(self.counts) - self.counts
        begins = np.cumsum(counts) - counts
        entries = np.repeat(starts[tokens] - begins, counts) + np.arange(counts.sum())
        return StoredProxy(counts, self.ids[entries], self.log_q[entries])

    def where(self, mask: npt.NDArray[np.bool_]) -> StoredProxy:
        """Of the tokens [T] outside the mask nothing is kept."""
        entries = np.repeat(mask, self.counts)
        return StoredProxy(np.where(mask, self.counts, 0), self.ids[entries], self.log_q[entries])

    @classmethod
    def join(cls, num_tokens: int, parts: Sequence[tuple[Indices, StoredProxy]]) -> StoredProxy:
        """From (which of the tokens, their entries); a token's entries may come in several parts, in their order."""
        token = [np.repeat(tokens, part.counts) for tokens, part in parts]
        ids, log_q = [part.ids for _, part in parts], [part.log_q for _, part in parts]
        of_entry = np.concatenate([np.zeros(0, dtype=np.int64), *token])
        order = np.argsort(of_entry, kind="stable")
        return cls(
            np.bincount(of_entry, minlength=num_tokens),
            np.concatenate([np.zeros(0, dtype=np.int32), *ids])[order],
            np.concatenate([np.zeros(0, dtype=np.float32), *log_q])[order],
        )
