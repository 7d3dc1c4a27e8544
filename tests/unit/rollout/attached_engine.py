"""An engine that is attached to the server of `faulty_server.py`, and what it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.sglang.kind import KIND
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.types import SamplingParams
from tests.unit.rollout.faulty_server import END_TOKEN

SAMPLING = SamplingParams(n=2, max_tokens=10, temperature=1.0, stop_token_ids=(END_TOKEN,), seed=0)
PROMPTS = [(1, 2, 3), (4, 5)]
LAUNCH = EngineLaunch(KIND, Path("unused"), "cpu", "float32", 64)
GOOD = [[[103, 104, 105, 106, 2]] * 2, [[102, 103, 104, 105, 2]] * 2]
"""The server's answers to the prompts."""


class Clock:
    """The clock of a server's liveness, which a test moves: a busy machine is no reason to give a server up."""

    now = 0.0
    strftime = staticmethod(time.strftime)

    def monotonic(self) -> float:
        return self.now


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def attached(url: str, keeps_requests: bool = False, **settings: Any) -> AsyncIterator[HttpEngine]:
    launch = replace(LAUNCH, server=ServerSettings(urls=[url], **settings), url=url, keeps_requests=keeps_requests)
    engine = HttpEngine(launch)
    await engine.start()
    await engine.resume()
    try:
        yield engine
    finally:
        await engine.close()


async def tokens(engine: HttpEngine, sampling: SamplingParams = SAMPLING) -> list[list[list[int]]]:
    return [[g.token_ids.tolist() for g in group] for group in await engine.generate(PROMPTS, sampling)]
