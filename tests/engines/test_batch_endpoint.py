"""Answers of our middleware in vLLM equal those of its own handler; requests that the middleware leaves to that
handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megatron_rl.rollout.engines.interface import Address
from megatron_rl.rollout.engines.vllm.request_batcher import PATH, RequestBatcher
from megatron_rl.rollout.engines.vllm.server import _choice, _response, _sampling
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import HttpClient, ServerRefused
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


def test_answers_equal_those_of_vllms_own_handler(engine: HttpEngine, run: Run[list[Any]]) -> None:
    requests = [REQUEST, REQUEST | {"token_ids": [1, 5]}]

    async def both(client: HttpClient) -> tuple[list[Any], list[Any]]:
        batcher = RequestBatcher(client)
        compact = await asyncio.gather(*(batcher.send(request, 600.0) for request in requests))
        path = "/inference/v1/generate"
        own = [(await client.post(path, request, timeout_seconds=600.0))["choices"] for request in requests]
        return compact, [[_choice(choice) for choice in choices] for choices in own]

    for compact, full in zip(*run(with_client(address(engine), both)), strict=True):
        assert len(compact) == len(full) == SAMPLING.n
        for ours, theirs in zip(*(sorted(answer, key=lambda c: c.index) for answer in (compact, full)), strict=True):
            mine, other = _response(ours), _response(theirs)
            assert (mine.token_ids.tolist(), mine.finish_reason) == (other.token_ids.tolist(), other.finish_reason)
            assert (mine.weight_version, mine.version_changes) == (other.weight_version, other.version_changes)
            assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(mine.log_probs, other.log_probs, strict=True))
            assert mine.token_ids.dtype == "int32" and mine.log_probs.dtype == "float32"


def test_a_request_without_the_key_is_refused(engine: HttpEngine, run: Run[list[Any]]) -> None:
    for key in (None, "guessed"):
        stranger = Address(address(engine).url, key)
        with pytest.raises(ServerRefused, match=r"status 40[14]"):
            run(with_client(stranger, lambda client: client.post(PATH, [REQUEST], timeout_seconds=600.0)))


def test_invalid_requests_are_left_to_vllms_handler(engine: HttpEngine, run: Run[list[Any]]) -> None:
    async def answers(client: HttpClient) -> list[Any]:
        batcher = RequestBatcher(client)
        return await asyncio.gather(*(batcher.send(request, 600.0) for request in [*WRONG, REQUEST]))

    *wrong, right = run(with_client(address(engine), answers))
    assert wrong == [None, None] and len(right) == SAMPLING.n


def test_vllms_handler_reports_what_is_wrong(engine: HttpEngine, run: Run[list[Any]]) -> None:
    with pytest.raises(ServerRefused, match=r"status 400.*(?i:context|length)"):
        run(engine._server.generate([1, 5] * 64, SAMPLING, 600.0))
