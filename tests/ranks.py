"""Starts the ranks of a test as processes of one fork server.

The server imports what ranks need once per pytest process; a rank is then forked in milliseconds, where a fresh process
would import for seconds. A test module names a function of its own as the ranks' work.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessContext

from tests.patience import CEILING_SECONDS, Patience

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    *("megatron_rl.actor.worker", "megatron_rl.conversion.convert", "megatron_rl.training.update"),
    *("tests.hf_models", "tests.trl_runs", "pytest", "hypothesis"),
]
"""Modules that the server imports before it forks. Modules that are not installed are left out."""
_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
"""The last one is what ranks on a CPU have in a run: `actor/platform/environment.py`."""


def context() -> Any:
    """Returns the multiprocessing context whose processes are forked from the server, which is started if needed.

    Processes see the environment of this module's import: whatever a test changes later is an argument of their work.
    """
    CONTEXT.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ |= _ENVIRONMENT  # the server finds the modules to import by PYTHONPATH
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return CONTEXT


def run_ranks(work: Callable[..., Any], count: int, *arguments: Any, ceiling: float = CEILING_SECONDS) -> list[Any]:
    """Runs `work(rank, *arguments)` in `count` processes; returns the results by rank.

    An error in a rank ends the others and is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        started = start(_save_result, count, work, Path(folder), *arguments)
        wait(started, work.__qualname__, ceiling)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def start(work: Callable[..., None], count: int, *arguments: Any) -> ProcessContext:
    """Starts `work(rank, *arguments)` in `count` processes."""
    context()
    return torch.multiprocessing.start_processes(
        _enter, (work, *arguments), nprocs=count, join=False, start_method="forkserver"
    )


def wait(started: ProcessContext, what: str, ceiling: float = CEILING_SECONDS) -> None:
    """Blocks until all processes have ended. Raises Stuck if they do not move, ProcessRaisedException if one failed."""
    patience = Patience(started.pids, what, ceiling=ceiling)
    try:
        while not started.join(timeout=2.0):
            patience.check()
    finally:
        for process in started.processes:
            process.kill()
            process.join()


def _enter(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(rank, *arguments)


def _save_result(rank: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    torch.save(work(rank, *arguments), folder / f"{rank}.pt")
