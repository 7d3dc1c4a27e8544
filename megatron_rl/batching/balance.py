"""Even work: what a row costs, and parts that cost about the same."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

EXCHANGES = 4
"""At most so many a group; where rows are many, few help."""


def row_costs(lengths: npt.NDArray[np.int64], even_length: float | None) -> npt.NDArray[np.float64]:
    """[N], the time of each row's forward and backward, up to a factor: its tokens go through matrix products, which
    cost the same for each, and look at the tokens before them, which costs the more the longer the row.

    even_length: the length of row at which the two are even (`Architecture.even_length`); None: only tokens count.
    """
    tokens = lengths.astype(np.float64)
    return tokens if even_length is None else tokens * (1 + tokens / even_length)


def balanced(costs: npt.NDArray[np.float64], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` groups of about the same sum: the dearest first, each to the group that has least
    so far (no group then exceeds the mean by more than one item, Graham 1969); then exchanged between the dearest group
    and cheaper ones, as long as that helps."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, number) for number in range(parts)]
    for index in np.argsort(-costs, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (load + float(costs[index]), number))
    _level(groups, costs)
    return groups


def _level(groups: list[list[int]], costs: npt.NDArray[np.float64]) -> None:
    """Exchange items of the dearest group, or give one away, to the cheapest group with which that helps."""
    loads = np.array([costs[group].sum() for group in groups])
    for _ in range(EXCHANGES * len(groups)):
        dear = int(loads.argmax())
        for cheap in np.argsort(loads, kind="stable").tolist():
            if change := _exchange(groups[dear], groups[cheap], costs, float(loads[dear] - loads[cheap])):
                loads[dear] -= change
                loads[cheap] += change
                break
        else:
            return


def _exchange(dear: list[int], cheap: list[int], costs: npt.NDArray[np.float64], gap: float) -> float:
    """Give the item that brings two groups which are `gap` apart nearest to each other, for one in return or for
    nothing. Returns what the cheap one gains: 0 where nothing brings them nearer."""
    change = costs[dear][:, None] - np.append(costs[cheap], 0.0)
    distance = np.where((change > 1e-9 * gap) & (change < (1 - 1e-9) * gap), np.abs(change - gap / 2), np.inf)
    if not np.isfinite(distance.min(initial=np.inf)):
        return 0.0
    give, take = divmod(int(distance.argmin()), len(cheap) + 1)
    item = dear.pop(give)
    if take < len(cheap):
        dear.append(cheap.pop(take))
    cheap.append(item)
    return float(change[give, take])
