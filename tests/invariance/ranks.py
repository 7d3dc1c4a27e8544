"""Runs a test module as a script in four real gloo processes, and splits these into smaller groups.

A module calls `run_ranks(__file__, folder)` in its fixture, and `one_rank(work)` when it runs as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4

Results = dict[Any, Any]


def run_ranks(script: str, folder: Path) -> list[Results]:
    """Returns the result of `work` on each rank."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def one_rank(work: Callable[[int], Results]) -> None:
    """Joins the four processes, does the work, and saves the results for `run_ranks`."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def split(rank: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, dist.ProcessGroup, int]]:
    """Yields for each size: the size, this rank's group of that size, and its rank within the group."""
    for size in sizes:
        # Every rank must take part in creating every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, RANKS, size)]
        yield size, groups[rank // size], rank % size
