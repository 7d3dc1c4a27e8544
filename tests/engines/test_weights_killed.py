"""A server that dies during an update. These must be the last tests with the shared server."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.rollout.engines.interface import EngineLost
from megatron_rl.rollout.servers.http_engine import FOLDER_PREFIX, HttpEngine
from tests.engines.conftest import Run, server_processes
from tests.engines.test_generate import PROMPTS, SAMPLING
from tests.engines.test_weights import Sender


def test_a_server_that_dies_in_an_update_is_lost(engine: HttpEngine, run: Run[Any], model: Path) -> None:
    sender = Sender(model, "weights-killed")
    sender.meet(engine, run)
    assert engine._process is not None
    server = server_processes(psutil.Process(engine._process._process.pid))[0]

    async def scenario() -> None:
        updating = asyncio.create_task(engine.update_weights(sender.update(9)))
        await asyncio.sleep(0.5)  # it waits for the first bucket, which is never sent
        server.kill()
        with pytest.raises(EngineLost, match=r"its server has ended|does not answer after a failed update"):
            await updating
        with pytest.raises(EngineLost):
            await engine.generate(PROMPTS, SAMPLING)

    run(scenario())
    sender.transport.close()


def test_a_dead_server_leaves_no_folder(engine: HttpEngine) -> None:
    assert not list(Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}{psutil.Process().pid}-*"))
