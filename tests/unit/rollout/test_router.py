"""The start of sglang-router, and requests while servers behind it come and go.

The router itself is tested with the real one, in tests/engines."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.interface import Address, response_of
from megatron_rl.rollout.servers import requests
from megatron_rl.rollout.servers import router as module
from megatron_rl.rollout.servers.liveness import Liveness
from megatron_rl.rollout.servers.requests import ServerRequests
from megatron_rl.rollout.servers.router import Router, command
from megatron_rl.rollout.servers.server import ServerUnavailable
from megatron_rl.types import Response, SamplingParams

A, B = Address("http://a"), Address("http://b")
SAMPLING = SamplingParams(n=1, max_tokens=4, temperature=1.0, stop_token_ids=(2,), seed=0)


def test_a_missing_router_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # sees no installed package
    bare.chmod(0o755)
    router = Router(ServerSettings(router="round_robin", python=bare))
    with pytest.raises(UserError, match=rf"rollout\.server\.router.*{bare} -m pip install sglang-router"):
        asyncio.run(router.start())


def test_the_router_listens_on_this_machine_only_and_checks_no_health() -> None:
    line = command(ServerSettings(router="cache_aware", request_timeout_seconds=0.5), 20_000, 20_001)
    assert line[line.index("--policy") + 1] == "cache_aware"
    assert line[line.index("--request-timeout-secs") + 1] == "1"
    assert line[line.index("--host") + 1] == line[line.index("--prometheus-host") + 1] == "127.0.0.1"
    assert {"--disable-health-check", "--disable-circuit-breaker"} <= set(line)


class ServersBehind:
    """Servers behind a router. Each request meets the next fault: gone, hangs, or an answer of another version."""

    def __init__(self, *faults: str | int) -> None:
        self.faults, self.urls, self.requests = deque(faults), set[str](), 0

    async def become(self, servers: Sequence[Address]) -> set[str]:
        self.urls = {server.url for server in servers}
        return self.urls

    async def abort_all(self) -> None:
        """Does nothing: a hung server does not react."""

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float) -> list[Response]:
        self.requests += 1
        fault = self.faults.popleft() if self.faults else 3
        if fault == "gone":
            raise ServerUnavailable("status 503")
        if fault == "hangs":
            await asyncio.sleep(60)
        return [response_of([7, 2], [-0.1, -0.1], "stop", int(fault))]


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> Callable[[ServersBehind], Router]:
    monkeypatch.setattr(requests, "FIRST_BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(module, "LEFT_BEHIND_SECONDS", 0.2)

    def make(behind: ServersBehind) -> Router:
        """Must be called within an event loop."""
        settings = ServerSettings(router="round_robin", urls=[A.url, B.url])
        router, servers = Router(settings), behind
        whatever: Any = servers
        router._liveness, router._servers = Liveness(), whatever
        router._requests = ServerRequests(servers, settings, router._liveness, ServerUnavailable)
        return router

    return make


@pytest.mark.parametrize("faults", [(), ("gone", "gone"), (2,), (2, "gone", -1)])
def test_only_answers_from_the_weights_of_the_run_are_used(
    routed: Callable[[ServersBehind], Router], faults: tuple[Any]
) -> None:
    behind = ServersBehind(*faults)

    async def scenario() -> list[list[Response]]:
        router = routed(behind)
        await router.serve([A, B], 3)
        return await router.generate([(1,)], SAMPLING)

    ((answer,),) = asyncio.run(scenario())
    assert answer.weight_versions.tolist() == [3, 3]
    assert behind.requests == 1 + len(faults)


def test_requests_of_a_hung_server_are_made_again_when_it_is_removed(
    routed: Callable[[ServersBehind], Router],
) -> None:
    behind = ServersBehind("hangs")

    async def scenario() -> list[list[Response]]:
        router = routed(behind)
        await router.serve([A, B], 3)
        asking = asyncio.create_task(router.generate([(1,)], SAMPLING))
        while not behind.requests:
            await asyncio.sleep(0.01)
        await router.serve([B], 3)
        return await asking

    ((answer,),) = asyncio.run(scenario())
    assert answer.finish_reason == "stop" and behind.requests == 2


def test_requests_wait_while_there_is_no_server(routed: Callable[[ServersBehind], Router]) -> None:
    behind = ServersBehind()

    async def scenario() -> None:
        router = routed(behind)
        await router.serve([A], 3)
        await router.serve([], 3)
        asking = asyncio.create_task(router.generate([(1,)], SAMPLING))
        await asyncio.sleep(0.1)
        assert behind.requests == 0
        await router.serve([B], 3)
        await asking

    asyncio.run(scenario())
