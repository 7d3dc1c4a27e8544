"""No process of a server outlives its owner."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.rollout.servers import guard
from megatron_rl.rollout.servers.server_process import ServerProcess
from tests.patience import is_alive

TREE = "import subprocess, sys, time; subprocess.Popen(['sleep', '100']); print('up', flush=True); time.sleep(100)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {TREE}"


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if is_alive(process)]


async def started(program: str) -> tuple[ServerProcess, list[psutil.Process]]:
    """The server process, and the guard's two processes and the program's."""
    process = await ServerProcess.start([sys.executable, "-c", program], {})
    root = psutil.Process(process._process.pid)
    while len(tree := root.children(recursive=True)) < 3:
        await asyncio.sleep(0.05)
    return process, [root, *tree]


def test_stop_ends_all_processes() -> None:
    async def scenario() -> None:
        process, tree = await started(STUBBORN)
        await process.stop()
        assert alive(tree) == []

    asyncio.run(scenario())


def test_a_server_can_end_in_order(tmp_path: Path) -> None:
    """It gets SIGTERM, which only ends it if the guard has not left the signal ignored."""
    program = (
        "import os, signal, sys, time\n"
        f"ended = lambda *_: (open({str(tmp_path / 'ended')!r}, 'w').close(), sys.exit())\n"
        "if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL: signal.signal(signal.SIGTERM, ended)\n"
        f"{TREE}"
    )

    async def scenario() -> None:
        process, tree = await started(program)
        await process.stop()
        assert alive(tree) == []

    asyncio.run(scenario())
    assert (tmp_path / "ended").exists()


def test_a_process_that_dies_takes_the_others_along() -> None:
    async def scenario() -> None:
        process, tree = await started(TREE)
        tree[2].kill()
        await process.ended()
        await process.stop()
        assert alive(tree) == []

    asyncio.run(scenario())


@pytest.mark.parametrize("guard_as_well", [False, True])
def test_all_processes_end_with_an_owner_that_was_killed(guard_as_well: bool) -> None:
    """Ray ends a worker in this way: with its children, but not with their children."""
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, {guard.__file__!r}, "
            f"sys.executable, '-c', {TREE!r}], stdin=subprocess.PIPE, start_new_session=True)\ntime.sleep(100)",
        ],
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    tree = psutil.Process(owner.pid).children(recursive=True)
    assert len(tree) == 4
    if guard_as_well:
        tree[0].kill()
    owner.kill()
    owner.wait()
    while alive(tree):
        time.sleep(0.1)


def test_all_processes_end_with_the_watching_half_of_the_guard() -> None:
    async def scenario() -> None:
        process, tree = await started(TREE)
        tree[1].kill()
        await process.ended()
        await process.stop()
        assert alive(tree) == []

    asyncio.run(scenario())
