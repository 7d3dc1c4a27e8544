"""How sglang-router is started and when it is not, and what becomes of requests when servers behind it come and go.

What it does itself is tested with the real one, in tests/engines."""

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
from megatron_rl.rollout.servers import requests
from megatron_rl.rollout.servers import router as module
from megatron_rl.rollout.servers.liveness import Liveness
from megatron_rl.rollout.servers.requests import Requests
from megatron_rl.rollout.servers.router import Router, command
from megatron_rl.rollout.servers.server import Address, ServerUnavailable
from megatron_rl.types import Generation, SamplingParams

A, B = Address("http://a"), Address("http://b")
SAMPLING = SamplingParams(n=1, max_tokens=4, temperature=1.0, stop_token_ids=(2,), seed=0)


def test_a_missing_router_is_said_with_what_to_do(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # sees no installed package
    bare.chmod(0o755)
    router = Router(ServerSettings(router="round_robin", python=bare))
    with pytest.raises(UserError, match=rf"rollout\.server\.router.*{bare} -m pip install sglang-router"):
        asyncio.run(router.start())


def test_it_listens_on_this_machine_only_and_leaves_health_to_us() -> None:
    line = command(ServerSettings(router="cache_aware", request_timeout_seconds=0.5), 20_000, 20_001)
    assert line[line.index("--policy") + 1] == "cache_aware"
    assert line[line.index("--request-timeout-secs") + 1] == "1"
    assert line[line.index("--host") + 1] == line[line.index("--prometheus-host") + 1] == "127.0.0.1"
    assert {"--disable-health-check", "--disable-circuit-breaker"} <= set(line)


class Behind:
    """Servers behind a router. Each request meets the next fault: gone, hangs, or an answer of another version."""

    def __init__(self, *faults: str | int) -> None:
        self.faults, self.urls, self.asked = deque(faults), set[str](), 0

    async def become(self, servers: Sequence[Address]) -> set[str]:
        self.urls = {server.url for server in servers}
        return self.urls

    async def abort_all(self) -> None:
        """A server that hangs does not hear it."""

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float
    ) -> list[Generation]:
        self.asked += 1
        fault = self.faults.popleft() if self.faults else 3
        if fault == "gone":
            raise ServerUnavailable("status 503")
        if fault == "hangs":
            await asyncio.sleep(60)
        return [Generation([7, 2], [-0.1, -0.1], "stop", int(fault))]


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Behind], Router]:
    monkeypatch.setattr(requests, "FIRST_BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(module, "LEFT_BEHIND_SECONDS", 0.2)

    def make(behind: Behind) -> Router:
        """Within an event loop."""
        settings = ServerSettings(router="round_robin", urls=[A.url, B.url])
        router, servers = Router(settings), behind
        whatever: Any = servers
        router._liveness, router._servers = Liveness(), whatever
        router._requests = Requests(servers, settings, router._liveness, ServerUnavailable)
        return router

    return make


@pytest.mark.parametrize("faults", [(), ("gone", "gone"), (2,), (2, "gone", -1)])
def test_only_answers_of_the_weights_of_the_run_are_used(
    routed: Callable[[Behind], Router], faults: tuple[Any]
) -> None:
    behind = Behind(*faults)

    async def scenario() -> list[list[Generation]]:
        router = routed(behind)
        await router.serve([A, B], 3)
        return await router.generate([(1,)], SAMPLING)

    ((answer,),) = asyncio.run(scenario())
    assert answer.weight_versions == [3, 3]
    assert behind.asked == 1 + len(faults)


def test_what_a_server_has_that_hangs_is_asked_for_anew_when_it_is_taken_out(
    routed: Callable[[Behind], Router],
) -> None:
    behind = Behind("hangs")

    async def scenario() -> list[list[Generation]]:
        router = routed(behind)
        await router.serve([A, B], 3)
        asking = asyncio.create_task(router.generate([(1,)], SAMPLING))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(router.serve([B], 3), 3)
        return await asyncio.wait_for(asking, 3)

    ((answer,),) = asyncio.run(scenario())
    assert answer.finish_reason == "stop" and behind.asked == 2


def test_requests_wait_while_there_is_no_server(routed: Callable[[Behind], Router]) -> None:
    behind = Behind()

    async def scenario() -> None:
        router = routed(behind)
        await router.serve([A], 3)
        await router.serve([], 3)
        asking = asyncio.create_task(router.generate([(1,)], SAMPLING))
        await asyncio.sleep(0.1)
        assert behind.asked == 0
        await router.serve([B], 3)
        await asyncio.wait_for(asking, 3)

    asyncio.run(scenario())
