"""vLLM's answers by our middleware: those of its own handler, shorter; and what is left to that handler."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from megatron_rl.rollout.http_engine import HttpEngine
from megatron_rl.rollout.server import Address, HttpClient, ServerRefused
from megatron_rl.rollout.vllm import _generation, _sampling
from megatron_rl.types import SamplingParams
from tests.engines.conftest import Run

PATH = "/inference/v1/generate"
SAMPLING = SamplingParams(n=6, max_tokens=24, temperature=0.8, stop_token_ids=(2, 11, 12, 13, 14), seed=3)
REQUEST = {"brief": True, "token_ids": [1, 20, 31, 7], "sampling_params": _sampling(SAMPLING)}

pytestmark = pytest.mark.parametrize("engine", ["vllm"], indirect=True)


async def post(address: Address, *requests: dict[str, Any]) -> list[Any]:
    client = HttpClient(address)
    try:
        return await asyncio.gather(*(client.post(PATH, request, timeout_seconds=60.0) for request in requests))
    finally:
        await client.close()


def address(engine: HttpEngine) -> Address:
    found: Address = engine._server._http.address  # type: ignore[attr-defined]
    return found


def test_they_say_what_vllms_own_say(engine: HttpEngine, run: Run[list[Any]]) -> None:
    brief, long = run(post(address(engine), REQUEST, REQUEST | {"brief": False}))
    assert brief.keys() == {"choices"} and "usage" in long, "each by its own handler"
    for ours, theirs in zip(*(sorted(a["choices"], key=lambda c: c["index"]) for a in (brief, long)), strict=True):
        mine, other = _generation(ours), _generation(theirs)
        assert (mine.token_ids, mine.finish_reason) == (other.token_ids, other.finish_reason)
        assert (mine.weight_version, mine.version_changes) == (other.weight_version, other.version_changes)
        assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(mine.log_probs, other.log_probs, strict=True))


def test_a_stranger_gets_none(engine: HttpEngine, run: Run[list[Any]]) -> None:
    for key in (None, "guessed"):
        with pytest.raises(ServerRefused, match="status 401"):
            run(post(Address(address(engine).url, key), REQUEST))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sampling_params": _sampling(SAMPLING) | {"temperature": -1.0}}, "temperature"),
        ({"token_ids": [1, 5] * 64}, "(?i:context|length)"),
    ],
)
def test_what_cannot_be_done_is_said_in_vllms_words(
    engine: HttpEngine, run: Run[list[Any]], wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ServerRefused, match=f"status 400.*{words}"):
        run(post(address(engine), REQUEST | wrong))
