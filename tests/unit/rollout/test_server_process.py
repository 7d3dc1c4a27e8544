"""No process of a server outlives its owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rl.rollout.servers import guard
from megatron_rl.rollout.servers.server_process import ServerProcess

TREE = "import subprocess, sys, time; subprocess.Popen(['sleep', '100']); print('up', flush=True); time.sleep(100)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {TREE}"


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


async def started(program: str) -> tuple[ServerProcess, list[int]]:
    """The server process, and the ids of the guard's two processes and of the program's."""
    process = await ServerProcess.start([sys.executable, "-c", program], {})
    root = psutil.Process(process._process.pid)
    while len(tree := root.children(recursive=True)) < 3:
        await asyncio.sleep(0.05)
    return process, [root.pid, *(child.pid for child in tree)]


def test_stop_ends_all_processes() -> None:
    async def scenario() -> None:
        process, pids = await started(STUBBORN)
        await process.stop()
        assert alive(pids) == []

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
        process, pids = await started(program)
        await process.stop()
        assert alive(pids) == []

    asyncio.run(scenario())
    assert (tmp_path / "ended").exists()


def test_a_process_that_dies_takes_the_others_along() -> None:
    async def scenario() -> None:
        process, pids = await started(TREE)
        os.kill(pids[2], signal.SIGKILL)
        await process.ended()
        await process.stop()
        assert alive(pids) == []

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
    pids = [child.pid for child in psutil.Process(owner.pid).children(recursive=True)]
    assert len(pids) == 4
    if guard_as_well:
        os.kill(pids[0], signal.SIGKILL)
    owner.kill()
    owner.wait()
    while alive(pids):
        time.sleep(0.1)


def test_all_processes_end_with_the_watching_half_of_the_guard() -> None:
    async def scenario() -> None:
        process, pids = await started(TREE)
        os.kill(pids[1], signal.SIGKILL)
        await process.ended()
        await process.stop()
        assert alive(pids) == []

    asyncio.run(scenario())
