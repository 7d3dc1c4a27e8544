"""Requests that go to vLLM as one batch: each gets its own answer, whatever happens to the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import Address, EngineLaunch
from megatron_rl.rollout.engines.vllm.array_frames import encode
from megatron_rl.rollout.engines.vllm.kind import KIND
from megatron_rl.rollout.engines.vllm.request_batcher import PATH
from megatron_rl.rollout.engines.vllm.server import VllmServer, _choice
from megatron_rl.rollout.servers import requests
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import ServerRefused, ServerUnavailable
from megatron_rl.types import Response, SamplingParams

SAMPLING = SamplingParams(n=2, max_tokens=4, temperature=1.0, stop_token_ids=(2,), seed=0)
SLOW, BAD = 90, 91
"""First tokens of prompts: the server answers when the test tells it to; vLLM's own handler answers with status 400."""


def choices(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Responses that each consist of the prompt's last token and the end token."""
    choice = {
        "token_ids": [asked["token_ids"][-1], 2],
        "logprobs": {"content": [{"logprob": -0.5}] * 2},
        "finish_reason": "stop",
        "weight_versions": [{"version": "default", "start": 0, "end": 2}],
    }
    return [choice | {"index": i} for i in range(asked["sampling_params"]["n"])]


@dataclass
class Vllm:
    """The part of vLLM's HTTP interface that rollouts use, with our middleware or without it."""

    middleware: bool = True
    faults: list[str] = field(default_factory=list)
    """Fault of each next batch: error; drop or damage, after half of the answers; once they are used up, batches are
    answered."""
    batches: list[list[Any]] = field(default_factory=list)
    singles: list[Any] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    given_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "default"})

    async def batch(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.batches.append(asked)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "error":
            return web.Response(status=500)
        answer = web.StreamResponse()
        await answer.prepare(request)
        slow_last = sorted(enumerate(asked), key=lambda pair: pair[1]["token_ids"][0] == SLOW)
        for count, (place, one) in enumerate(slow_last):
            if fault == "drop" and count == len(asked) // 2:
                assert request.transport
                request.transport.abort()
            if one["token_ids"][0] == SLOW:
                try:
                    await self.go_on.wait()
                except asyncio.CancelledError:
                    self.given_up.set()
                    raise
            found = None if one["token_ids"][0] == BAD else choices(one)
            frame = bytearray(encode(place, found and [_choice(choice) for choice in found]))
            if fault == "damage" and count >= len(asked) // 2:
                frame[-1] ^= 1
            for part in (frame[:7], frame[7:]):
                await answer.write(part)
                await asyncio.sleep(0.001)
        return answer

    async def single(self, request: web.Request) -> web.Response:
        one = await request.json()
        self.singles.append(one)
        if one["token_ids"][0] == BAD:
            return web.Response(status=400, text="no such token")
        return web.json_response({"choices": choices(one)})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Gives the server's URL."""
        app = web.Application()
        app.router.add_get("/weight_info", self.weight_info)
        app.router.add_post("/inference/v1/generate", self.single)
        if self.middleware:
            app.router.add_post(PATH, self.batch)
        async with TestServer(app, handler_cancellation=True) as server:
            yield str(server.make_url("")).rstrip("/")


@asynccontextmanager
async def server_of(vllm: Vllm) -> AsyncIterator[VllmServer]:
    async with vllm.running() as url:
        server = VllmServer(Address(url))
        try:
            yield server
        finally:
            await server.close()


def send(server: VllmServer, *prompts: Sequence[int]) -> list[asyncio.Task[list[Response]]]:
    return [asyncio.create_task(server.generate(prompt, SAMPLING, 10.0)) for prompt in prompts]


def first_tokens(groups: Sequence[Sequence[Response]]) -> list[list[int]]:
    return [[int(response.token_ids[0]) for response in group] for group in groups]


Scenario = Callable[[Vllm, VllmServer], Awaitable[None]]


def run(scenario: Scenario, **vllm: Any) -> Vllm:
    async def main() -> Vllm:
        fake = Vllm(**vllm)
        async with asyncio.timeout(600), server_of(fake) as server:
            await scenario(fake, server)
        return fake

    return asyncio.run(main())


def test_requests_of_one_moment_form_a_batch_whose_answers_do_not_wait_for_the_slowest() -> None:
    async def scenario(vllm: Vllm, server: VllmServer) -> None:
        first, slow, last = send(server, (1, 11), (SLOW, 12), (1, 13))
        assert first_tokens([await first, await last]) == [[11, 11], [13, 13]] and not slow.done()
        vllm.go_on.set()
        assert first_tokens([await slow]) == [[12, 12]]
        assert first_tokens(await asyncio.gather(*send(server, (1, 14)))) == [[14, 14]]

    assert [len(asked) for asked in run(scenario).batches] == [3, 1]


def test_vllms_own_handler_reports_why_a_request_fails() -> None:
    async def scenario(vllm: Vllm, server: VllmServer) -> None:
        good, bad = send(server, (1, 11), (BAD, 12))
        assert first_tokens([await good]) == [[11, 11]]
        with pytest.raises(ServerRefused, match="no such token"):
            await bad

    assert len(run(scenario).singles) == 1


def test_a_server_without_the_middleware_gets_requests_one_by_one() -> None:
    async def scenario(vllm: Vllm, server: VllmServer) -> None:
        for _ in range(2):
            assert first_tokens(await asyncio.gather(*send(server, (1, 11), (1, 12)))) == [[11, 11], [12, 12]]

    assert len(run(scenario, middleware=False).singles) == 4


@pytest.mark.parametrize(("fault", "answered"), [("error", 0), ("drop", 2), ("damage", 2)])
def test_a_failed_batch_fails_the_requests_without_an_answer(fault: str, answered: int) -> None:
    async def scenario(vllm: Vllm, server: VllmServer) -> None:
        found = await asyncio.gather(*send(server, (1, 11), (1, 12), (1, 13), (1, 14)), return_exceptions=True)
        assert [isinstance(one, list) for one in found] == [True] * answered + [False] * (4 - answered)
        assert all(isinstance(one, ServerUnavailable) for one in found[answered:])
        assert first_tokens([await send(server, (1, 15))[0]]) == [[15, 15]], "the server does not answer again"

    assert not run(scenario, faults=[fault]).singles


def test_a_batch_is_given_up_when_all_its_requests_are_cancelled() -> None:
    async def scenario(vllm: Vllm, server: VllmServer) -> None:
        first, second, third = send(server, (SLOW, 11), (SLOW, 12), (1, 13))
        await third
        first.cancel()
        await asyncio.sleep(0.1)
        assert not vllm.given_up.is_set(), "the second request was given up too"
        second.cancel()
        await vllm.given_up.wait()
        (early,) = send(server, (SLOW, 14))
        await asyncio.sleep(0)
        early.cancel()

    assert len(run(scenario).batches) == 1, "a request that was cancelled at once was sent"


def test_no_response_is_lost_or_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_BACK_OFF_SECONDS", 0.01)
    prompts = [(1, 10 + i) for i in range(40)]

    async def scenario() -> Vllm:
        vllm = Vllm(faults=["drop", "error", "damage", "drop"])
        async with vllm.running() as url:
            settings = ServerSettings(urls=[url], request_attempts=8)
            engine = HttpEngine(EngineLaunch(KIND, Path("unused"), "cpu", "float32", 64, settings, url))
            await engine.start()
            await engine.resume()
            try:
                groups = await engine.generate(prompts, replace(SAMPLING, n=3))
                assert first_tokens(groups) == [[10 + i] * 3 for i in range(40)]
            finally:
                await engine.close()
        return vllm

    vllm = asyncio.run(scenario())
    assert not vllm.faults and len(vllm.batches[0]) == 40
