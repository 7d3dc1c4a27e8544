"""Whether a server is still alive.

A server is given up (`EngineLost`) when its process ends, when it gives no sign of life, or when one request to it
fails several times. Its owner then replaces the whole server and uses nothing of it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from megatron_rl.rollout.engines.interface import EngineLost
from megatron_rl.rollout.servers.server import ServerRefused, ServerUnavailable
from megatron_rl.rollout.servers.server_process import ServerProcess
from megatron_rl.utils import heartbeat

T = TypeVar("T")


class Liveness:
    """Liveness of one server from its start. Must be made within the event loop that waits for the server."""

    def __init__(self) -> None:
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watches: list[asyncio.Task[None]] = []
        self._seconds = 0.0
        """Seconds for which this process has watched. While it is stopped or blocked, it cannot hear the server."""

    async def begin(self, alive: Callable[[], Awaitable[None]], timeout_seconds: float) -> None:
        """Returns at the server's first sign of life. Raises EngineLost if there is none in time."""
        await self.while_there(self._first_sign(alive, timeout_seconds))

    def end(self) -> None:
        self.lose("it was closed")
        for watch in self._watches:
            watch.cancel()

    def lose(self, reason: str) -> EngineLost:
        """Gives the server up, which ends every wait for it. Returns the error to raise."""
        if not self._lost.done():
            log(f"given up: {reason}")
            self._lost.set_result(reason)
        return EngineLost(self._lost.result())

    async def while_there(self, work: Awaitable[T]) -> T:
        """Returns the work's result; raises EngineLost as soon as the server is given up. The work is cancelled with
        the wait for it."""
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        raise EngineLost(self._lost.result())

    async def until_lost(self) -> None:
        """Raises EngineLost once the server is given up; never returns."""
        raise EngineLost(await asyncio.shield(self._lost))

    # ------------------------------------------------------------------ signs of life

    def lose_at_end_of(self, process: ServerProcess) -> None:
        self._watch(self._lose_at_end_of(process))

    def lose_when_silent(
        self,
        alive: Callable[[], Awaitable[None]],
        hang_seconds: float,
        progress_deadline: Callable[[], float],
        doing: Callable[[], str],
    ) -> None:
        """hang_seconds: time limit of one call of `alive`. progress_deadline: returns the seconds for which the server
        may be silent at present, `hang_seconds` or more. doing: describes the work under way, for this process's own
        heartbeat."""
        self._watch(self._count_seconds(min(1.0, hang_seconds / 8)))
        self._watch(self._lose_when_silent(alive, hang_seconds, progress_deadline, doing))

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        self._watches.append(asyncio.create_task(work))

    async def _first_sign(self, alive: Callable[[], Awaitable[None]], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                return await alive()
            except ServerUnavailable as error:
                if time.monotonic() > deadline:
                    raise self.lose(f"it did not answer within {timeout_seconds:g} s") from error
                await asyncio.sleep(0.5)

    async def _lose_at_end_of(self, process: ServerProcess) -> None:
        await process.ended()
        self.lose("its server has ended")

    async def _count_seconds(self, at_a_time: float) -> None:
        while not self._lost.done():
            await asyncio.sleep(at_a_time)
            self._seconds += at_a_time

    async def _lose_when_silent(
        self,
        alive: Callable[[], Awaitable[None]],
        hang_seconds: float,
        progress_deadline: Callable[[], float],
        doing: Callable[[], str],
    ) -> None:
        heard = self._seconds
        while not self._lost.done():
            heartbeat.notify(doing())
            await asyncio.sleep(min(5.0, hang_seconds / 4))
            try:
                async with asyncio.timeout(hang_seconds):
                    await alive()
            except (ServerUnavailable, ServerRefused, TimeoutError) as error:
                limit = progress_deadline()
                if self._seconds - heard > limit:
                    self.lose(f"it has given no sign of life for {limit:g} s: {error}")
            else:
                heard = self._seconds


def log(line: str) -> None:
    """Prints to this process's output, which is its log file in the run's folder."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
