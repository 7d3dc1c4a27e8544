"""Even work: what a row costs, and parts that cost about the same."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt


def row_costs(lengths: npt.NDArray[np.int64], even_length: float | None) -> npt.NDArray[np.float64]:
    """[N], the time of each row's forward and backward, up to a factor: its tokens go through matrix products, which
    cost the same for each, and look at the tokens before them, which costs the more the longer the row.

    even_length: the length of row at which the two are even (`Architecture.even_length`); None: only tokens count.
    """
    tokens = lengths.astype(np.float64)
    return tokens if even_length is None else tokens * (1 + tokens / even_length)


def balanced(costs: npt.NDArray[np.float64], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` groups of about the same sum: the dearest first, each to the group that has least
    so far. No group exceeds the mean by more than one item (Graham 1969)."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, number) for number in range(parts)]
    for index in np.argsort(-costs, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (load + float(costs[index]), number))
    return groups
