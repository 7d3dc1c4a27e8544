"""The processes of a server, started together and ended together."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress

import psutil

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.rollout.servers import guard

PORTS = range(20_000, 32_000)
"""Ports above Ray's, and below those that Linux gives to outgoing connections: a server binds its port seconds after it
was chosen, and an outgoing connection could take the port meanwhile."""


def free_port(host: str = LOOPBACK) -> int:
    """Returns a free port at an address of this machine. Raises OSError if none is found."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"100 ports between {PORTS.start} and {PORTS.stop - 1} were tried, and none was free")


class ServerProcess:
    """A command under `guard`. Its output goes where this process's output goes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: list[str], environment: Mapping[str, str]) -> ServerProcess:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, guard.__file__, *command),
            stdin=asyncio.subprocess.PIPE,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
        return cls(process)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def ended(self) -> None:
        """Returns once the process has ended, whatever the cause."""
        await self._process.wait()

    async def stop(self) -> None:
        """Ends the command; returns once none of its processes is left."""
        tree = self._tree()  # a server may have processes in groups of their own
        if self.running and self._process.stdin is not None:
            self._process.stdin.close()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), guard.GRACE_SECONDS + 5)
        with suppress(ProcessLookupError):  # the guard may have been killed before its children
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        while any(_alive(process) for process in [*tree, *self._group()]):
            await asyncio.sleep(0.05)

    def _group(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _group_of(process) == self._process.pid]

    def _tree(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None
