"""The HTTP calls to vLLM and their order; tests/engines make them with real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import Address, Drafts, EngineLaunch
from megatron_rl.rollout.engines.vllm.kind import KIND
from megatron_rl.rollout.engines.vllm.server import VllmServer, command
from megatron_rl.rollout.servers.server import ServerUnavailable
from megatron_rl.weight_sync.transport import FolderUpdate

UPDATE = FolderUpdate(4, (Path("part-0"), Path("part-1")))
UPDATE_CALLS = ["/collective_rpc end_open_update", "/start_weight_update", "/update_weights", "/update_weights"]
UPDATE_CALLS += [
    "/finish_weight_update",
    "/collective_rpc weight_failure",
    "/reset_prefix_cache",
    "/update_weight_version",
]


class FakeConnection:
    """Records calls in place of a connection."""

    def __init__(self, server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails = ""
        monkeypatch.setattr(server._http, "_send", self.send)

    async def send(self, method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        self.calls.append(f"{path} {body['method']}" if path == "/collective_rpc" else path)
        if path == self.fails:
            raise ServerUnavailable("told to fail")
        return {"results": [[]]}


def test_vllm_stays_paused_after_a_partial_update(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        server = VllmServer(Address("http://unused"))
        connection = FakeConnection(server, monkeypatch)
        connection.fails = "/update_weights"
        with pytest.raises(ServerUnavailable):
            await server.load_weights(UPDATE, 1.0)
        assert connection.calls == ["/pause?mode=abort", *UPDATE_CALLS[:3]]
        connection.fails, connection.calls = "", []
        await server.load_weights(UPDATE, 1.0)
        assert connection.calls == ["/pause?mode=abort", *UPDATE_CALLS, "/resume"]
        await server.close()

    asyncio.run(scenario())


def test_memory_is_released_at_once_and_restored_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleeping server is paused already, and would end if it resumed before its cache is restored."""

    async def scenario() -> None:
        server = VllmServer(Address("http://unused"))
        connection = FakeConnection(server, monkeypatch)
        await server.release_memory(1.0)
        await server.restore_memory("weights", 1.0)
        await server.load_weights(UPDATE, 1.0)
        await server.restore_memory("kv_cache", 1.0)
        assert connection.calls == ["/sleep?level=2", "/wake_up?tags=weights", *UPDATE_CALLS, "/wake_up?tags=kv_cache"]
        connection.calls = []
        await server.load_weights(UPDATE, 1.0)
        assert connection.calls == ["/pause?mode=abort", *UPDATE_CALLS, "/resume"]
        await server.close()

    asyncio.run(scenario())


def test_vllm_keeps_frozen_requests_during_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes only when it is told to, and no cache is reset that requests use."""

    async def scenario() -> None:
        server = VllmServer(Address("http://unused"))
        connection = FakeConnection(server, monkeypatch)
        await server.freeze(1.0)
        connection.fails = "/update_weights"
        with pytest.raises(ServerUnavailable):
            await server.load_weights(UPDATE, 1.0)
        connection.fails, connection.calls = "", []
        await server.freeze(1.0)
        await server.load_weights(UPDATE, 1.0)
        await server.unfreeze(1.0)
        updating = [call for call in UPDATE_CALLS if call != "/reset_prefix_cache"]
        assert connection.calls == ["/pause?mode=keep&clear_cache=false", *updating, "/resume"]
        await server.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("metrics", "drafts"),
    [
        (
            'vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 1234.0\n'
            'vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 6.0\n'
            "vllm:spec_decode_num_draft_tokens_created 1.7e+09\n"
            'vllm:spec_decode_num_accepted_tokens_total{engine="0"} 1.2e+03\n'
            'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 9.0\n',
            Drafts(1240, 1200),
        ),
        ("http_requests_total 5.0\n", Drafts()),
    ],
)
def test_drafts_are_read_from_the_metrics(metrics: str, drafts: Drafts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        server = VllmServer(Address("http://unused"))

        async def send(method: str, path: str, body: Any, timeout_seconds: float) -> str:
            assert (method, path) == ("GET", "/metrics")
            return metrics

        monkeypatch.setattr(server._http, "_send", send)
        assert await server.drafts() == drafts
        await server.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("arguments", [[], ["--speculative-config", "{}"], ["--speculative-config={}"]])
def test_statistics_are_on_if_the_server_speculates(arguments: list[str], tmp_path: Path) -> None:
    launch = EngineLaunch(KIND, tmp_path, "cpu", "float32", 64, ServerSettings(arguments=arguments))
    line, _ = command(launch, 1, "key", tmp_path)
    assert ("--disable-log-stats" in line) == (not arguments)
