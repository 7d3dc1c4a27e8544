"""How a test's ranks find each other, without a port that someone else may take meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.actor import platform
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout

HOST = "127.0.0.1"


@contextmanager
def only_rank() -> Iterator[None]:
    """This process is the only rank."""
    platform.prepare("cpu")
    process_groups.init_process_groups(Layout(), rank=0, store=dist.HashStore(), device=torch.device("cpu"))
    yield
    process_groups.destroy()


def meeting_point(worker: MegatronWorker, file: Path) -> tuple[str, int]:
    """Where all ranks `start`; rank 0 says in the file what port it opened. A file serves one meeting."""
    if worker.rank == 0:
        file.with_suffix(".new").write_text(str(worker.open_port(HOST)))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    return HOST, int(file.read_text())
