"""An engine with a server that fails: no response is lost, repeated or sampled from the wrong weights."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import Drafts, EngineLost
from megatron_rl.rollout.engines.sglang.server import SglangServer
from megatron_rl.rollout.servers import requests
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import ServerRefused, ServerUnavailable
from tests.unit.rollout.attached_engine import GOOD, LAUNCH, PROMPTS, SAMPLING, Clock, attached, tokens, until
from tests.unit.rollout.faulty_server import END_TOKEN, Script


@pytest.mark.parametrize("fault", ["error", "drop", "error drop error", "drop drop", "damaged"])
def test_a_failed_request_is_retried(server: tuple[str, Script], fault: str) -> None:
    url, script = server
    script.faults.extend(fault.split())

    async def scenario() -> None:
        async with attached(url) as engine:
            assert await tokens(engine) == GOOD

    asyncio.run(scenario())
    assert len(script.requests) == len(PROMPTS) + len(fault.split())


def test_a_request_that_takes_too_long_is_retried(server: tuple[str, Script]) -> None:
    url, script = server
    script.faults.append("slow")

    async def scenario() -> None:
        async with attached(url, request_timeout_seconds=3.0) as engine:
            assert await tokens(engine) == GOOD

    asyncio.run(scenario())
    assert len(script.requests) == 3


def test_a_server_that_keeps_failing_is_given_up(server: tuple[str, Script]) -> None:
    url, script = server
    script.faults.extend(["error"] * 100)

    async def scenario() -> None:
        async with attached(url, request_attempts=3) as engine:
            with pytest.raises(EngineLost, match="a request failed 3 times"):
                await tokens(engine)
            with pytest.raises(EngineLost):  # it stays given up
                await engine.health()

    asyncio.run(scenario())
    assert len(script.requests) <= 6


def test_a_hung_server_is_given_up(server: tuple[str, Script], clock: Clock) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url, hang_seconds=0.4) as engine:
            script.seconds = 600
            asking = asyncio.create_task(tokens(engine))
            await until(lambda: len(script.requests) == len(PROMPTS))
            script.healthy = False
            clock.now += 1.0
            with pytest.raises(EngineLost, match=r"no sign of life for 0\.4 s"):
                await asking

    asyncio.run(scenario())


def test_a_refused_request_is_not_retried(server: tuple[str, Script]) -> None:
    url, script = server
    script.faults.append("refuse")

    async def scenario() -> None:
        async with attached(url) as engine:
            with pytest.raises(ServerRefused, match=r"status 400.*told to refuse"):
                await engine.generate(PROMPTS[:1], SAMPLING)

    asyncio.run(scenario())
    assert len(script.requests) == 1


def test_answers_from_other_weights_are_never_used(server: tuple[str, Script]) -> None:
    """This happens after a restart that the run does not know of."""
    url, script = server
    script.faults.append("stale")

    async def scenario() -> None:
        async with attached(url) as engine:
            with pytest.raises(EngineLost, match="it serves weights -7, not -1"):
                await tokens(engine)

    asyncio.run(scenario())


def test_an_answer_without_a_log_prob_for_every_token_is_an_error(server: tuple[str, Script]) -> None:
    url, script = server
    script.faults.append("short")

    async def scenario() -> None:
        async with attached(url) as engine:
            with pytest.raises(ValueError, match="5 tokens, 1 log-probs"):
                await tokens(engine)

    asyncio.run(scenario())


def test_aborted_responses_are_returned_and_can_be_continued(server: tuple[str, Script]) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url) as engine:
            script.seconds = 600
            asking = asyncio.create_task(engine.generate(PROMPTS[:1], SAMPLING))
            await until(lambda: len(script.requests) == 1)
            await engine.abort()
            (group,) = await asking
            assert [(g.token_ids.tolist(), g.finish_reason) for g in group] == [([103, 104], "abort")] * 2
            script.seconds = 0.0
            (complete,) = await engine.generate(PROMPTS[:1], SAMPLING, [group])
            assert [g.token_ids.tolist() for g in complete] == [[103, 104, 105, 106, 107, 108, END_TOKEN]] * 2
            assert [g.finish_reason for g in complete] == ["stop"] * 2
            (again,) = await engine.generate(PROMPTS[:1], SAMPLING, [complete])
            assert again == complete

    asyncio.run(scenario())
    assert [(len(body["input_ids"]), body["sampling_params"]["n"]) for body in script.requests] == [
        (3, 2),
        (5, 1),
        (5, 1),
    ]


def test_a_request_between_two_attempts_is_aborted_too(
    server: tuple[str, Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, script = server
    monkeypatch.setattr(requests, "FIRST_BACK_OFF_SECONDS", 3.0)
    script.faults.extend(["error", "error"])

    async def scenario() -> None:
        async with attached(url) as engine:
            asking = asyncio.create_task(engine.generate(PROMPTS, SAMPLING))
            await until(lambda: script.answered == len(PROMPTS))
            await engine.abort()
            assert [[g.token_ids.tolist() for g in group] for group in await asking] == [[[], []]] * 2

    asyncio.run(scenario())
    assert len(script.requests) == 2


@pytest.mark.parametrize("stop", [HttpEngine.abort, HttpEngine.pause])
def test_an_abort_that_fails_is_made_again(server: tuple[str, Script], stop: Any) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url) as engine:
            script.seconds = 600
            asking = asyncio.create_task(engine.generate(PROMPTS[:1], SAMPLING))
            await until(lambda: len(script.requests) == 1)
            script.abort_faults = 3
            await stop(engine)
            script.seconds = 0.0
            await engine.resume()
            assert all(g.token_ids[:2].tolist() == [103, 104] for g in (await asking)[0])

    asyncio.run(scenario())
    assert script.abort_faults == 0


def test_a_request_that_is_aborted_while_paused_does_not_wait(server: tuple[str, Script]) -> None:
    url, _ = server

    async def scenario() -> None:
        async with attached(url) as engine:
            await engine.pause()
            asking = asyncio.create_task(tokens(engine))
            await asyncio.sleep(0.1)
            await engine.abort()
            assert await asking == [[[], []]] * 2
            asking = asyncio.create_task(tokens(engine))
            await asyncio.sleep(0.1)
            assert not asking.done(), "it ran while paused"
            await engine.resume()
            assert await asking == GOOD

    asyncio.run(scenario())


def test_a_request_that_does_not_return_when_it_is_aborted_is_made_again(
    server: tuple[str, Script], clock: Clock
) -> None:
    url, script = server
    script.faults.append("slow")

    async def scenario() -> None:
        async with attached(url, hang_seconds=0.5) as engine:
            asking = asyncio.create_task(tokens(engine))
            await until(lambda: len(script.requests) == len(PROMPTS) and script.answered == 1)
            await engine.pause()
            await engine.resume()
            assert await asking == GOOD

    asyncio.run(scenario())
    assert len(script.requests) == 3


def test_the_models_own_end_token_does_not_end_a_response(server: tuple[str, Script]) -> None:
    url, _ = server

    async def scenario() -> None:
        async with attached(url) as engine:
            sampling = replace(SAMPLING, n=1, stop_token_ids=(77,), max_tokens=8)
            (response,), *_ = await engine.generate(PROMPTS[:1], sampling)
            assert response.token_ids.tolist() == [103, 104, 105, 106, END_TOKEN, 108, 109, 110]
            assert response.finish_reason == "length"

    asyncio.run(scenario())


def test_a_server_that_cannot_be_reached_is_an_error() -> None:
    url = "http://127.0.0.1:9"
    settings = ServerSettings(urls=[url], start_timeout_seconds=0.2)

    async def scenario() -> None:
        with pytest.raises(EngineLost, match=r"did not answer within 0\.2 s"):
            await HttpEngine(replace(LAUNCH, server=settings, url=url)).start()

    asyncio.run(scenario())


def test_a_cancelled_call_leaves_no_request_under_way(server: tuple[str, Script]) -> None:
    url, script = server
    script.seconds = 20.0

    async def scenario() -> None:
        async with attached(url) as engine:
            calls = [asyncio.create_task(engine.generate([prompt], SAMPLING)) for prompt in PROMPTS]
            while str(engine._requests) != "2 requests under way":
                await asyncio.sleep(0.01)
            calls[0].cancel()
            await asyncio.wait(calls[:1])
            await asyncio.sleep(0.1)
            assert str(engine._requests) == "1 requests under way" and not calls[1].done()
            calls[1].cancel()
            await asyncio.wait(calls)
            assert all(call.cancelled() for call in calls)

    asyncio.run(scenario())


def test_drafts_are_counted_since_the_last_question(
    server: tuple[str, Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, script = server

    async def fails(server: SglangServer) -> Drafts:
        raise ServerUnavailable("told to fail")

    async def scenario() -> None:
        async with attached(url) as engine:
            await tokens(engine)
            assert await engine.take_drafts() == Drafts()
            script.speculates = True
            await tokens(engine)
            assert await engine.take_drafts() == Drafts(16, 12), "two prompts with two responses each"
            assert await engine.take_drafts() == Drafts()
            monkeypatch.setattr(SglangServer, "drafts", fails)
            assert await engine.take_drafts() == Drafts(), "the engine is not lost"
            assert await tokens(engine) == GOOD

    asyncio.run(scenario())


def test_a_server_that_was_started_without_speculation_is_not_asked_for_drafts() -> None:
    assert asyncio.run(HttpEngine(LAUNCH).take_drafts()) == Drafts(), "there is no server to ask"
