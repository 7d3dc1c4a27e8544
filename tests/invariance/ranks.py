"""Four real gloo processes, and smaller groups of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import ranks

RANKS = 4

Results = dict[Any, Any]


def run_ranks(work: Callable[..., Results], folder: Path, *arguments: Any) -> list[Results]:
    """Returns the result of `work(rank, *arguments)` on each rank."""
    return ranks.run_ranks(_in_group, RANKS, work, folder, *arguments)


def _in_group(rank: int, work: Callable[..., Results], folder: Path, *arguments: Any) -> Results:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found = work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    return found


def split(rank: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, dist.ProcessGroup, int]]:
    """Yields for each size: the size, this rank's group of that size, and its rank within the group."""
    for size in sizes:
        # Every rank must take part in creating every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, RANKS, size)]
        yield size, groups[rank // size], rank % size
