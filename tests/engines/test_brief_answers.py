"""vLLM's answers by our middleware: those of its own handler, shorter; and what is left to that handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megatron_rl.rollout.engines.vllm.request_batcher import PATH, RequestBatcher
from megatron_rl.rollout.engines.vllm.server import _generation, _sampling
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import Address, HttpClient, ServerRefused
from megatron_rl.types import SamplingParams
from tests.engines.conftest import Run

SAMPLING = SamplingParams(n=6, max_tokens=24, temperature=0.8, stop_token_ids=(2, 11, 12, 13, 14), seed=3)
REQUEST = {"token_ids": [1, 20, 31, 7], "sampling_params": _sampling(SAMPLING)}
WRONG = [
    REQUEST | {"sampling_params": _sampling(SAMPLING) | {"temperature": -1.0}},
    REQUEST | {"token_ids": [1, 5] * 64},
]

pytestmark = pytest.mark.parametrize("engine", ["vllm"], indirect=True)


async def with_client(address: Address, work: Callable[[HttpClient], Awaitable[Any]]) -> Any:
    client = HttpClient(address)
    try:
        return await work(client)
    finally:
        await client.close()


def address(engine: HttpEngine) -> Address:
    found: Address = engine._server._http.address  # type: ignore[attr-defined]
    return found


def test_they_say_what_vllms_own_say(engine: HttpEngine, run: Run[list[Any]]) -> None:
    requests = [REQUEST, REQUEST | {"token_ids": [1, 5]}]

    async def both(client: HttpClient) -> tuple[list[Any], list[Any]]:
        together = RequestBatcher(client)
        brief = await asyncio.gather(*(together.ask(request, 60.0) for request in requests))
        path = "/inference/v1/generate"
        return brief, [(await client.post(path, request, timeout_seconds=60.0))["choices"] for request in requests]

    for brief, long in zip(*run(with_client(address(engine), both)), strict=True):
        assert len(brief) == len(long) == SAMPLING.n
        for ours, theirs in zip(*(sorted(answer, key=lambda c: c["index"]) for answer in (brief, long)), strict=True):
            mine, other = _generation(ours), _generation(theirs)
            assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
            assert (mine.weight_version, mine.version_changes) == (other.weight_version, other.version_changes)
            assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(mine.log_probs, other.log_probs, strict=True))


def test_a_stranger_gets_none(engine: HttpEngine, run: Run[list[Any]]) -> None:
    for key in (None, "guessed"):
        stranger = Address(address(engine).url, key)
        with pytest.raises(ServerRefused, match=r"status 40[14]"):
            run(with_client(stranger, lambda client: client.post(PATH, [REQUEST], timeout_seconds=60.0)))


def test_what_cannot_be_done_is_left_to_vllms_handler(engine: HttpEngine, run: Run[list[Any]]) -> None:
    async def asked(client: HttpClient) -> list[Any]:
        together = RequestBatcher(client)
        return await asyncio.gather(*(together.ask(request, 60.0) for request in [*WRONG, REQUEST]))

    *wrong, right = run(with_client(address(engine), asked))
    assert wrong == [None, None] and len(right) == SAMPLING.n


def test_which_says_what_is_wrong(engine: HttpEngine, run: Run[list[Any]]) -> None:
    with pytest.raises(ServerRefused, match=r"status 400.*(?i:context|length)"):
        run(engine._server.generate([1, 5] * 64, SAMPLING, 60.0))
