"""Rows that begin alike, as a tree: a position that several have in common is run once.

What a causal model computes at a position depends on the tokens up to it alone. So the rows of one prompt can share its
positions, and their responses share theirs as far as they say the same; gradients of all that follow add up there.

A row takes its length less one positions, as its last token is only a target. They are numbered row after row in
`order`, in which rows that begin alike are neighbours: what follows from a position, and nothing else, then has the
numbers after it up to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_rl.batching.arrays import Indices
from megatron_rl.types import Ids


@dataclass(frozen=True)
class PrefixTree:
    """Of N rows. Everything is in the order of `order`, not of the rows."""

    order: Indices
    """[N], numbers of the rows."""
    lengths: Indices
    """[N], positions of each row."""
    shared: Indices
    """[N], how many of them, from its start, the row before it has too; 0 for the first of a tree."""

    @classmethod
    def of(cls, rows: Sequence[Ids]) -> PrefixTree:
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
        """Of rows of so many positions that share nothing, in their own order."""
        return cls(np.arange(len(lengths)), lengths.astype(np.int64), np.zeros(len(lengths), dtype=np.int64))

    @cached_property
    def own(self) -> Indices:
        """[N], the positions that a row adds to those of the rows before it."""
        return self.lengths - self.shared

    @cached_property
    def starts(self) -> Indices:
        """[N], the number of its first own position."""
        return np.cumsum(self.own) - self.own

    @property
    def size(self) -> int:
        """Positions of all."""
        return int(self.own.sum())

    @cached_property
    def paths(self) -> list[Indices]:
        """N arrays: the number of each of a row's positions."""
        paths: list[Indices] = []
        for start, shared, own in zip(self.starts, self.shared, self.own, strict=True):
            inherited = paths[-1][:shared] if paths else np.zeros(0, dtype=np.int64)
            paths.append(np.concatenate([inherited, np.arange(start, start + own)]))
        return paths

    @cached_property
    def depths(self) -> Indices:
        """[size], of each position the number of those before it in its rows."""
        return np.arange(self.size) + np.repeat(self.shared - self.starts, self.own)

    @cached_property
    def ends(self) -> Indices:
        """[size], where the positions end that see this one."""
        ends = np.empty(self.size, dtype=np.int64)
        of_depth = np.full(int(self.lengths.max(initial=0)), self.size)
        for start, shared, length in zip(self.starts[::-1], self.shared[::-1], self.lengths[::-1], strict=True):
            ends[start : start + length - shared] = of_depth[shared:length]
            of_depth[shared:] = start  # to the rows before, whatever is deeper than what they share with this one ends
        return ends

    def runs(self, longest: int) -> list[range]:
        """Neighbours in the order that share something, in runs that see at most `longest` positions together."""
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
    """Length of the prefix that both have."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
