"""A tree of the common prefixes of sequences, so that each shared position is computed once.

What a causal model computes at a position depends only on the tokens up to that position. So the sequences of one
prompt can share the positions of the prompt, and responses can share positions as long as their tokens are the same.
Gradients of everything that follows a shared position add up there.

The last token of a sequence is only a target, so a sequence of n tokens takes n - 1 positions. Positions are numbered
sequence after sequence in the sorted `order`, in which sequences with a common prefix are neighbours. So the positions
that follow from a position p are exactly those numbered from p + 1 up to, but not including, `ends[p]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_rl.batching.arrays import Indices
from megatron_rl.types import Ids


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Prefix tree of N sequences. All arrays are in the sorted order, not in that of the batch."""

    order: Indices
    """[N], indices of the sequences in the batch, sorted so that common prefixes are neighbours."""
    lengths: Indices
    """[N], number of positions of each sequence."""
    shared: Indices
    """[N], length of the prefix that each sequence shares with the one before it; 0 for the first of a tree."""

    @classmethod
    def of(cls, rows: Sequence[Ids]) -> PrefixTree:
        """Returns the tree of these sequences, each an array of token ids."""
        order = sorted(range(len(rows)), key=lambda i: rows[i][:-1].tobytes())
        ordered = [rows[i][:-1] for i in order]
        shared = [_in_common(row, before) for row, before in zip(ordered[1:], ordered, strict=False)]
        return cls(
            np.array(order, dtype=np.int64),
            np.array([len(row) for row in ordered], dtype=np.int64),
            np.array([0, *shared][: len(rows)], dtype=np.int64),
        )

    @classmethod
    def separate(cls, lengths: npt.NDArray[np.integer]) -> PrefixTree:
        """Returns the tree of sequences with these numbers of positions that share nothing, in the given order."""
        return cls(np.arange(len(lengths)), lengths.astype(np.int64), np.zeros(len(lengths), dtype=np.int64))

    @cached_property
    def own(self) -> Indices:
        """[N], number of positions that each sequence adds to those of the sequences before it."""
        return self.lengths - self.shared

    @cached_property
    def starts(self) -> Indices:
        """[N], index of the first position that each sequence adds."""
        return np.cumsum(self.own) - self.own

    @property
    def size(self) -> int:
        """Number of positions of the tree."""
        return int(self.own.sum())

    @cached_property
    def paths(self) -> list[Indices]:
        """N arrays, the indices of all positions of each sequence."""
        paths: list[Indices] = []
        for start, shared, own in zip(self.starts, self.shared, self.own, strict=True):
            inherited = paths[-1][:shared] if paths else np.zeros(0, dtype=np.int64)
            paths.append(np.concatenate([inherited, np.arange(start, start + own)]))
        return paths

    @cached_property
    def depths(self) -> Indices:
        """[size], place of each position in its own sequences."""
        return np.arange(self.size) + np.repeat(self.shared - self.starts, self.own)

    @cached_property
    def ends(self) -> Indices:
        """[size], end (exclusive) of the range of positions that attend to each position."""
        ends = np.empty(self.size, dtype=np.int64)
        of_depth = np.full(int(self.lengths.max(initial=0)), self.size)
        for start, shared, length in zip(self.starts[::-1], self.shared[::-1], self.lengths[::-1], strict=True):
            ends[start : start + length - shared] = of_depth[shared:length]
            of_depth[shared:] = start  # for earlier sequences, positions below the shared prefix end here
        return ends

    def ends_with_padding(self, size: int) -> Indices:
        """[size], `ends` followed by those of padding, which attends to padding only."""
        return np.append(self.ends, np.full(size - self.size, size))

    def runs(self, longest: int) -> list[range]:
        """Splits the sorted sequences into runs of neighbours with a common prefix.

        A run covers at most `longest` positions, its shared prefix included, unless it is a single sequence.
        """
        runs: list[range] = []
        seen = 0
        for i, (shared, own) in enumerate(zip(self.shared.tolist(), self.own.tolist(), strict=True)):
            if runs and shared and seen + own <= longest:
                runs[-1] = range(runs[-1].start, i + 1)
                seen += own
            else:
                runs.append(range(i, i + 1))
                seen = shared + own
        return runs


def _in_common(a: Ids, b: Ids) -> int:
    """Returns the length of the common prefix."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
