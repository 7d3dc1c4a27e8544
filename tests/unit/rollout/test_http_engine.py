"""An engine with a server that fails: no response is lost, repeated or sampled from the wrong weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import Drafts, EngineLaunch, EngineLost, UpdateFailed
from megatron_rl.rollout.engines.sglang.kind import KIND
from megatron_rl.rollout.engines.sglang.server import SglangServer
from megatron_rl.rollout.servers import liveness, requests
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.server import ServerRefused, ServerUnavailable
from megatron_rl.types import SamplingParams
from megatron_rl.weight_sync.transport import FolderUpdate
from tests.unit.rollout.faulty_server import END_TOKEN, Script, faulty_server

SAMPLING = SamplingParams(n=2, max_tokens=10, temperature=1.0, stop_token_ids=(END_TOKEN,), seed=0)
PROMPTS = [(1, 2, 3), (4, 5)]
LAUNCH = EngineLaunch(KIND, Path("unused"), "cpu", "float32", 64)
GOOD = [[[103, 104, 105, 106, 2]] * 2, [[102, 103, 104, 105, 2]] * 2]


@pytest.fixture
def server() -> Iterator[tuple[str, Script]]:
    with faulty_server() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_BACK_OFF_SECONDS", 0.01)


class Clock:
    """The clock of a server's liveness, which a test moves: a busy machine is no reason to give a server up."""

    now = 0.0
    strftime = staticmethod(time.strftime)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def attached(url: str, keeps_requests: bool = False, **settings: Any) -> AsyncIterator[HttpEngine]:
    launch = replace(LAUNCH, server=ServerSettings(urls=[url], **settings), url=url, keeps_requests=keeps_requests)
    engine = HttpEngine(launch)
    await engine.start()
    await engine.resume()
    try:
        yield engine
    finally:
        await engine.close()


async def tokens(engine: HttpEngine, sampling: SamplingParams = SAMPLING) -> list[list[list[int]]]:
    return [[g.token_ids.tolist() for g in group] for group in await engine.generate(PROMPTS, sampling)]


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


def test_a_paused_request_continues_with_the_new_weights(server: tuple[str, Script], tmp_path: Path) -> None:
    url, script = server
    update = FolderUpdate(4, (tmp_path / "part-0.safetensors",))

    async def scenario() -> None:
        async with attached(url) as engine:
            script.seconds = 600
            asking = asyncio.create_task(engine.generate(PROMPTS[:1], SAMPLING))
            await until(lambda: len(script.requests) == 1)
            await engine.pause()
            script.seconds = 0.0
            await engine.update_weights(update)
            await asyncio.sleep(0.1)
            assert len(script.requests) == 1, "a request was made while paused"
            await engine.resume()
            first, second = (await asking)[0]
            assert first == second
            assert first.token_ids.tolist() == [103, 104, 105, 106, 107, 108, END_TOKEN]
            assert first.weight_versions.tolist() == [-1, -1, 4, 4, 4, 4, 4]

    asyncio.run(scenario())
    assert [(len(body["input_ids"]), body["sampling_params"]["n"]) for body in script.requests] == [
        (3, 2),
        (5, 1),
        (5, 1),
    ]


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server can keep requests across updates."""

    async def can(server: SglangServer) -> str:
        return ""

    async def freeze(server: SglangServer, seconds: float) -> None:
        await server._http.post("/pause_generation", {"mode": "in_place"}, timeout_seconds=seconds)

    async def unfreeze(server: SglangServer, seconds: float) -> None:
        await server._http.post("/continue_generation", {}, timeout_seconds=seconds)

    for name, method in (("cannot_freeze", can), ("freeze", freeze), ("unfreeze", unfreeze)):
        monkeypatch.setattr(SglangServer, name, method)


@pytest.mark.usefixtures("freezing")
def test_a_kept_request_goes_on_with_the_new_weights(server: tuple[str, Script], tmp_path: Path) -> None:
    """Nothing is sent again, and no sign of life is awaited that a frozen server cannot give."""
    url, script = server
    update = FolderUpdate(4, (tmp_path / "part-0.safetensors",))

    async def scenario() -> None:
        async with attached(url, keeps_requests=True, hang_seconds=1.0) as engine:
            script.seconds = 600
            asking = asyncio.create_task(engine.generate(PROMPTS[:1], SAMPLING))
            await until(lambda: len(script.requests) == 1)
            await engine.pause()
            script.healthy = False
            await asyncio.sleep(1.5)  # longer than a server that is not paused may be silent
            assert not asking.done()
            await engine.update_weights(update)
            waiting = asyncio.create_task(engine.generate(PROMPTS[1:], SAMPLING))
            await asyncio.sleep(0.1)
            assert len(script.requests) == 1 and not asking.done(), "a request was made while paused"
            script.healthy = True
            await engine.resume()
            for response in (await asking)[0]:
                assert response.token_ids.tolist() == [103, 104, 105, 106, END_TOKEN]
                assert response.weight_versions.tolist() == [-1, -1, 4, 4, 4]
            await waiting

    asyncio.run(scenario())
    assert script.control == [
        ("/pause_generation", "in_place"),
        ("/update_weights_from_disk", "4"),
        ("/continue_generation", None),
    ]


@pytest.mark.usefixtures("freezing")
def test_an_answer_of_weights_that_a_kept_request_never_had_is_not_used(
    server: tuple[str, Script], tmp_path: Path
) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url, keeps_requests=True) as engine:
            script.seconds = 600
            asking = asyncio.create_task(engine.generate(PROMPTS[:1], SAMPLING))
            await until(lambda: len(script.requests) == 1)
            await engine.pause()
            await engine.update_weights(FolderUpdate(4, (tmp_path / "part-0.safetensors",)))
            script.version = "9"
            with suppress(EngineLost):  # the regular look at the server may come first
                await engine.resume()
            with pytest.raises(EngineLost, match="it serves weights 9, not 4"):
                await asking

    asyncio.run(scenario())


def test_requests_are_aborted_if_the_server_cannot_keep_them(
    server: tuple[str, Script], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url, keeps_requests=True) as engine:
            await engine.pause()
            await engine.update_weights(FolderUpdate(4, (tmp_path / "part-0.safetensors",)))
            await engine.resume()

    asyncio.run(scenario())
    assert script.control == [("/update_weights_from_disk", "4")]
    assert "weight updates abort requests, which continue after a new prefill: SGLang" in capfd.readouterr().out


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


def test_an_idle_server_that_somebody_else_restarted_is_given_up(
    server: tuple[str, Script], tmp_path: Path, clock: Clock
) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url, hang_seconds=0.4) as engine:
            await engine.pause()
            await engine.update_weights(FolderUpdate(4, (tmp_path / "part-0.safetensors",)))
            await engine.resume()
            lost = asyncio.create_task(engine.until_lost())
            seen = script.looks
            await until(lambda: script.looks >= seen + 3)
            assert not lost.done()
            script.version = "-1"
            with pytest.raises(EngineLost, match="it serves weights -1, not 4"):
                await lost

    asyncio.run(scenario())


def test_memory_is_restored_for_weights_first_and_for_the_cache_after_them(
    server: tuple[str, Script], tmp_path: Path, clock: Clock
) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url, hang_seconds=1.0) as engine:
            await engine.release_memory()
            script.healthy = False  # without memory it cannot give a sign of life, and must not be given up
            with pytest.raises(UpdateFailed):
                await engine.resume()
            lost = asyncio.create_task(engine.until_lost())
            for _ in range(3):
                seen = script.looks
                await until(lambda seen=seen: script.looks > seen or lost.done())
                clock.now += 0.9
            assert not lost.done()
            script.healthy = True
            await engine.pause()
            await engine.update_weights(FolderUpdate(5, (tmp_path / "part-0.safetensors",)))
            await engine.resume()
            assert await tokens(engine) == GOOD

    asyncio.run(scenario())
    assert script.control == [
        ("/flush_cache", None),
        ("/release_memory_occupation", ["kv_cache", "weights"]),
        ("/resume_memory_occupation", ["weights"]),
        ("/update_weights_from_disk", "5"),
        ("/resume_memory_occupation", ["kv_cache"]),
    ]


@pytest.mark.parametrize("fault", ["error", "drop", "slow"])
def test_a_working_server_that_failed_an_update_serves_nothing_until_it_has_one(
    server: tuple[str, Script], tmp_path: Path, fault: str
) -> None:
    url, script = server
    script.update_faults.append(fault)
    update = FolderUpdate(4, (tmp_path / "part-0.safetensors",))

    async def scenario() -> None:
        async with attached(url, update_timeout_seconds=3.0) as engine:
            await engine.pause()
            with pytest.raises(UpdateFailed, match="update_weights_from_disk"):
                await engine.update_weights(update)
            with pytest.raises(UpdateFailed, match="part of a weight update"):
                await engine.resume()
            await engine.update_weights(update)
            await engine.resume()
            assert await tokens(engine) == GOOD

    asyncio.run(scenario())


def test_a_server_that_hangs_in_an_update_is_given_up(server: tuple[str, Script], tmp_path: Path, clock: Clock) -> None:
    url, script = server
    script.update_faults.append("slow")
    update = FolderUpdate(4, (tmp_path / "part-0.safetensors",))

    async def scenario() -> None:
        async with attached(url, hang_seconds=0.3) as engine:
            await engine.pause()
            script.healthy = False
            with pytest.raises(EngineLost):
                await engine.update_weights(update)

    asyncio.run(scenario())


def test_the_time_limit_of_an_update_grows_with_the_model() -> None:
    assert ServerSettings(hang_seconds=60).update_seconds(32 * 10**9) == 60 + 320
    assert ServerSettings(hang_seconds=60, update_timeout_seconds=5).update_seconds(32 * 10**9) == 5


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
