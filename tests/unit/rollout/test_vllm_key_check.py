"""The middleware that guards every path of vLLM's port. tests/engines asks a real vLLM on every path that it has."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.rollout.engines.vllm.key_check import KeyCheck


def answer(
    *, kind: str = "http", method: str = "POST", path: str = "/pause", key: bytes | None = None, keys: Any = None
) -> list[dict[str, Any]]:
    """What the middleware sends; [] if it passes the request on."""
    sent: list[dict[str, Any]] = []
    passed: list[dict[str, Any]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        passed.append(scope)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer " + key)] if key else []
    state = SimpleNamespace(args=SimpleNamespace(api_key=keys))
    scope = {"type": kind, "method": method, "path": path, "headers": headers, "app": SimpleNamespace(state=state)}
    asyncio.run(KeyCheck(app)(scope, receive, send))
    assert bool(passed) != bool(sent)
    return sent


@pytest.fixture(autouse=True)
def server_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")


@pytest.mark.parametrize("key", [None, b"", b"Secret", b"secret2"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("path", ["/pause", "/v1/models", "/health", "/no/such/path"])
def test_a_request_without_the_key_is_refused_on_every_path(key: bytes | None, method: str, path: str) -> None:
    start, body = answer(method=method, path=path, key=key)
    assert start["status"] == 401 and b"Unauthorized" in body["body"]


def test_a_request_with_the_key_is_passed_on() -> None:
    assert answer(key=b"secret") == []


def test_a_key_of_the_command_line_counts_before_that_of_the_environment() -> None:
    assert answer(key=b"other", keys=["other"]) == []
    assert answer(key=b"secret", keys=["other"])[0]["status"] == 401


def test_a_server_without_a_key_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY")
    assert answer() == []


def test_a_websocket_without_the_key_is_closed() -> None:
    assert answer(kind="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert answer(kind="websocket", key=b"secret") == []


def test_the_servers_own_start_and_end_pass() -> None:
    assert answer(kind="lifespan") == []
