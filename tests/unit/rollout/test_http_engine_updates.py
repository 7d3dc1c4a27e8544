"""An engine whose server takes new weights, or fails to: requests continue, and no answer is of the wrong weights."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import EngineLost, UpdateFailed
from megatron_rl.rollout.engines.sglang.server import SglangServer
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.weight_sync.transport import FolderUpdate
from tests.unit.rollout.attached_engine import GOOD, PROMPTS, SAMPLING, Clock, attached, tokens, until
from tests.unit.rollout.faulty_server import END_TOKEN, Script


async def updated(engine: HttpEngine, folder: Path) -> None:
    """Gives the engine weights of version 4."""
    await engine.pause()
    await engine.update_weights(FolderUpdate(4, (folder / "part-0.safetensors",)))
    await engine.resume()


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
            await updated(engine, tmp_path)

    asyncio.run(scenario())
    assert script.control == [("/update_weights_from_disk", "4")]
    assert "weight updates abort requests, which continue after a new prefill: SGLang" in capfd.readouterr().out


def test_an_idle_server_that_somebody_else_restarted_is_given_up(
    server: tuple[str, Script], tmp_path: Path, clock: Clock
) -> None:
    url, script = server

    async def scenario() -> None:
        async with attached(url, hang_seconds=0.4) as engine:
            await updated(engine, tmp_path)
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
