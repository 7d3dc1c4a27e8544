"""What vLLM is asked for, and in which order; that it takes it is tested with real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rollout.engines.vllm.server import VllmServer
from megatron_rl.rollout.servers.server import Address, ServerUnavailable
from megatron_rl.weight_sync.transport import FolderUpdate

UPDATE = FolderUpdate(4, (Path("part-0"), Path("part-1")))
TAKEN = ["/collective_rpc end_open_update", "/start_weight_update", "/update_weights", "/update_weights"]
TAKEN += ["/finish_weight_update", "/collective_rpc weight_failure", "/reset_prefix_cache", "/update_weight_version"]


class Asked:
    """In the place of a connection."""

    def __init__(self, server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails = ""
        monkeypatch.setattr(server._http, "_send", self.send)

    async def send(self, method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        self.calls.append(f"{path} {body['method']}" if path == "/collective_rpc" else path)
        if path == self.fails:
            raise ServerUnavailable("told to fail")
        return {"results": [[]]}


def test_nothing_is_begun_with_half_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        server = VllmServer(Address("http://unused"))
        asked = Asked(server, monkeypatch)
        asked.fails = "/update_weights"
        with pytest.raises(ServerUnavailable):
            await server.load_weights(UPDATE, 1.0)
        assert asked.calls == ["/pause?mode=abort", *TAKEN[:3]]
        asked.fails, asked.calls = "", []
        await server.load_weights(UPDATE, 1.0)
        assert asked.calls == ["/pause?mode=abort", *TAKEN, "/resume"]
        await server.close()

    asyncio.run(scenario())


def test_memory_is_all_given_back_and_taken_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep it is paused as it is; to resume it before the cache is there would end it."""

    async def scenario() -> None:
        server = VllmServer(Address("http://unused"))
        asked = Asked(server, monkeypatch)
        await server.release_memory(1.0)
        await server.restore_memory("weights", 1.0)
        await server.load_weights(UPDATE, 1.0)
        await server.restore_memory("kv_cache", 1.0)
        assert asked.calls == ["/sleep?level=2", "/wake_up?tags=weights", *TAKEN, "/wake_up?tags=kv_cache"]
        asked.calls = []
        await server.load_weights(UPDATE, 1.0)
        assert asked.calls == ["/pause?mode=abort", *TAKEN, "/resume"]
        await server.close()

    asyncio.run(scenario())
