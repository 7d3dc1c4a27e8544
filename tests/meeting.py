"""Lets the ranks of a test find each other and exchange results.

Rank 0 opens a port itself; a port that is only found to be free could be taken by another process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.actor import platform
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.replicas import Batch
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.rollout.engines.interface import LOOPBACK


@contextmanager
def only_rank() -> Iterator[None]:
    """Makes this process the only rank."""
    platform.prepare("cpu")
    process_groups.init_process_groups(Layout(), rank=0, store=dist.HashStore(), device=torch.device("cpu"))
    yield
    process_groups.destroy()


def meeting_point(worker: MegatronWorker, file: Path) -> tuple[str, int]:
    """Returns the host and port for `start` on all ranks. Rank 0 writes its open port to `file`, which is used once."""
    if worker.rank == 0:
        file.with_suffix(".new").write_text(str(worker.open_port(LOOPBACK)))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return LOOPBACK, int(file.read_text())


def sent_to(worker: MegatronWorker, batch: SequenceBatch) -> Batch:
    """Returns what a run sends of a batch to this rank. A rank that is alone gets the whole batch, as tools give it."""
    layout, rank = worker.layout, worker.rank
    if layout.world_size == 1:
        return batch
    part = worker.sharing().part_of(batch, layout.replica_of(rank))
    return part if layout.stage_of(rank) == layout.pipeline - 1 else part.without_values()


def gathered(part: Any) -> list[Any]:
    """Returns the parts of all ranks, on every rank, without the ranks whose part is None."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [part for part in parts if part is not None]
