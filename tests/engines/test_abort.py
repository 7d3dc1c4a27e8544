"""Partial rollouts with real servers: aborted responses continue from where they were, and log-probs stay the
policy's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.types import Response, SamplingParams
from tests.engines.conftest import Run
from tests.engines.test_generate import largest_gap

PROMPTS = [(1, 20 + i, 31, 7) for i in range(24)]
SAMPLING = SamplingParams(n=4, max_tokens=56, temperature=1.0, stop_token_ids=(94,), seed=1)


async def abort_after(engine: HttpEngine, seconds: float) -> list[list[Response]]:
    asking = asyncio.create_task(engine.generate(PROMPTS, SAMPLING))
    await asyncio.sleep(seconds)
    await engine.abort()
    return await asking


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def unfinished(groups: Sequence[Sequence[Response]]) -> list[Response]:
    return [response for group in groups for response in group if response.finish_reason == "abort"]


def test_aborted_responses_are_continued(engine: HttpEngine, run: Run[Any], model: Path) -> None:
    full_time = min(seconds(lambda: run(engine.generate(PROMPTS, SAMPLING))) for _ in range(3))  # the first is slow
    for share in (0.5, 0.3, 0.7, 0.2, 0.9, 0.1) * 4:  # however fast or busy the machine is
        groups: list[list[Response]] = run(abort_after(engine, share * full_time))
        if any(map(len, unfinished(groups))):
            break
    assert any(map(len, unfinished(groups))), "no response was aborted in the middle"
    complete: list[list[Response]] = run(engine.generate(PROMPTS, SAMPLING, groups))
    assert not unfinished(complete)
    for before, after in zip(groups, complete, strict=True):
        assert len(after) == SAMPLING.n
        for first, last in zip(before, after, strict=True):
            length = len(first)
            assert last.token_ids[:length].tolist() == first.token_ids.tolist()
            assert last.log_probs[:length].tolist() == first.log_probs.tolist()
            assert len(last) == SAMPLING.max_tokens or last.finish_reason == "stop"
    place = next(i for i, group in enumerate(groups) if any(map(len, unfinished([group]))))
    for response in complete[place]:
        assert largest_gap(model, PROMPTS[place], response, 1.0) < 1e-4
