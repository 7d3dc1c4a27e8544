"""Balanced work: what a sequence costs, and groups of sequences that cost about the same."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

EXCHANGES = 4
"""Maximum number of exchanges per group. With many sequences, few exchanges are useful."""


def row_costs(lengths: npt.NDArray[np.int64], even_length: float | None) -> npt.NDArray[np.float64]:
    """Returns [N], the relative time of each sequence's forward and backward pass.

    The matrix products cost the same for each token. Attention to earlier tokens costs more per token the longer the
    sequence is.

    Args:
        lengths: [N], number of tokens of each sequence.
        even_length: length at which both parts cost the same (`Architecture.even_length`). With None, only the number
            of tokens counts.
    """
    tokens = lengths.astype(np.float64)
    return tokens if even_length is None else tokens * (1 + tokens / even_length)


def balanced(costs: npt.NDArray[np.float64], parts: int) -> list[list[int]]:
    """Splits the indices of `costs` into `parts` groups of about the same total cost.

    Each item, the most expensive first, goes to the group with the lowest total so far. No group then exceeds the mean
    by more than one item (Graham 1969). Afterwards items are exchanged between the most expensive group and cheaper
    ones, as long as that reduces the imbalance.
    """
    groups: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, number) for number in range(parts)]
    for index in np.argsort(-costs, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        groups[number].append(index)
        heapq.heappush(heap, (load + float(costs[index]), number))
    _level(groups, costs)
    return groups


def _level(groups: list[list[int]], costs: npt.NDArray[np.float64]) -> None:
    """Moves or exchanges single items between the most expensive group and the cheapest group with which that helps,
    until nothing helps or the limit of exchanges is reached."""
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
    """Moves the item from `dear` to `cheap`, with or without one in return, that brings their totals closest together.

    Returns the cost that `cheap` gains; 0 if no exchange brings the totals, which are `gap` apart, closer together.
    """
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
