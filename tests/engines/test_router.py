"""The real sglang-router in front of two real SGLang servers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.data.countdown import write_task
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.router import Router
from megatron_rl.rollout.servers.server import UNSYNCED, Address, HttpClient, ServerRefused
from megatron_rl.types import Generation, SamplingParams
from tests.e2e_cpu.conftest import CommandLine
from tests.engines.conftest import Run, launch, server_processes
from tests.engines.test_generate import largest_gap
from tests.engines.test_training import Training, assert_it_goes_on
from tests.engines.test_weights import in_folder

SETTINGS = ServerSettings(router="round_robin")
PROMPTS = [(1, 20 + i, 31, 7) for i in range(16)]
SAMPLING = SamplingParams(n=4, max_tokens=56, temperature=1.0, stop_token_ids=(94,), seed=1)


@dataclass
class Routed:
    engines: list[HttpEngine]
    addresses: list[Address]
    router: Router
    version: int = UNSYNCED

    async def begin(self) -> asyncio.Task[list[list[Generation]]]:
        """Requests that were under way in all servers a moment ago, however fast or busy the machine is."""
        for _ in range(20):
            asking = asyncio.create_task(self.router.generate(PROMPTS, SAMPLING))
            while not asking.done():
                if all(await self.loads()):
                    return asking
        raise AssertionError("they were never under way in all servers at once")

    async def loads(self) -> list[int]:
        """Responses under way in each server, as it says itself."""
        clients = [HttpClient(address) for address in self.addresses]
        answers = await asyncio.gather(
            *(client.get("/v1/loads?include=core", timeout_seconds=10.0) for client in clients)
        )
        for client in clients:
            await client.close()
        return [sum(load["num_running_reqs"] for load in answer["loads"]) for answer in answers]


@pytest.fixture(scope="module")
def routed(run: Run[Any], model: Path) -> Iterator[Routed]:
    hosts = ("127.0.0.1", "127.0.0.2")  # two nodes, as far as addresses go
    engines = [HttpEngine("sglang", SETTINGS, launch(model, host=host)) for host in hosts]
    router = Router(SETTINGS)

    async def start() -> list[Address]:
        *addresses, _ = await asyncio.gather(*(engine.start() for engine in engines), router.start())
        await asyncio.gather(*(engine.resume() for engine in engines))
        assert await router.serve(addresses, UNSYNCED) == {address.url for address in addresses}
        return addresses

    async def stop() -> None:
        await asyncio.gather(*(engine.close() for engine in engines), router.close())

    yield Routed(engines, run(start()), router)
    run(stop())


def assert_whole(model: Path, groups: list[list[Generation]], version: int) -> None:
    assert [len(group) for group in groups] == [SAMPLING.n] * len(PROMPTS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len({tuple(generation.token_ids) for generation in group}) == SAMPLING.n
        for generation in group:
            assert len(generation.token_ids) == SAMPLING.max_tokens or generation.token_ids[-1] == 94
            assert generation.finish_reason != "abort"
            assert generation.weight_versions[-1] == version
        assert largest_gap(model, prompt, group[0], 1.0) < 1e-4


def test_requests_go_to_all_servers_and_log_probs_are_the_policys(routed: Routed, run: Run[Any], model: Path) -> None:
    async def scenario() -> list[list[Generation]]:
        return await (await routed.begin())

    assert_whole(model, run(scenario()), routed.version)


def test_nothing_is_done_for_strangers_and_keys_are_in_no_command_line(routed: Routed, run: Run[Any]) -> None:
    servers = routed.router._servers
    url = servers._data._http.address.url
    for asked, path in ((url, "/workers"), (routed.addresses[1].url, "/generate")):
        stranger = HttpClient(Address(asked))
        with pytest.raises(ServerRefused, match="status 401"):
            run(stranger.post(path, {"url": "http://127.0.0.1:9"}, timeout_seconds=5.0))
        run(stranger.close())
    keys = [str(address.key) for address in routed.addresses]
    keys.append(str(servers._control.address.key))
    started = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    lines = [" ".join(process.cmdline()) for process in started]
    assert len(lines) > 3 and not any(key in line for key in keys for line in lines)


def test_a_cut_reaches_requests_in_all_servers_and_they_go_on(routed: Routed, run: Run[Any], model: Path) -> None:
    async def scenario() -> tuple[list[list[Generation]], list[list[Generation]]]:
        for _ in range(20):
            asking = await routed.begin()
            await routed.router.cut()
            cut = await asyncio.wait_for(asking, 5)
            if any(g.token_ids and g.finish_reason == "abort" for group in cut for g in group):
                return cut, await routed.router.generate(PROMPTS, SAMPLING, cut)
        raise AssertionError("nothing was cut in the middle")

    cut, whole = run(scenario())
    for before, after in zip(cut, whole, strict=True):
        for first, last in zip(before, after, strict=True):
            assert last.token_ids[: len(first.token_ids)] == first.token_ids
    assert_whole(model, whole, routed.version)


def test_an_update_reaches_requests_in_all_servers_and_they_go_on(
    routed: Routed, run: Run[Any], model: Path, tmp_path: Path
) -> None:
    async def scenario() -> list[list[Generation]]:
        for version in range(3, 23):
            asking = await routed.begin()
            await routed.router.pause()
            assert await routed.loads() == [0, 0]
            update, _ = in_folder(tmp_path, model, version)
            for engine in routed.engines:
                await engine.pause()
                await engine.update_weights(update)
                await engine.resume()
            await routed.router.serve(routed.addresses, version)
            before, routed.version, groups = routed.version, version, await asking
            seen = {version for group in groups for generation in group for version in generation.weight_versions}
            assert seen <= {before, version}
            if any(generation.version_changes for group in groups for generation in group):
                return groups
        raise AssertionError("no update ever came between two tokens")

    for group in run(scenario()):
        assert [len(g.token_ids) == SAMPLING.max_tokens or g.token_ids[-1] == 94 for g in group] == [True] * SAMPLING.n


def test_a_server_that_is_killed_takes_no_request_with_it(routed: Routed, run: Run[Any], model: Path) -> None:
    """The last of all tests with these two."""
    process = routed.engines[0]._process
    assert process is not None
    (first, *_) = server_processes(psutil.Process(process._process.pid))

    async def scenario() -> list[list[Generation]]:
        asking = await routed.begin()
        first.kill()
        with pytest.raises(Exception, match="its server has ended"):
            await routed.engines[0].until_lost()
        reached = await routed.router.serve(routed.addresses[1:], routed.version)
        assert reached == {routed.addresses[1].url}
        return await asyncio.wait_for(asking, 60)

    assert_whole(model, run(scenario()), routed.version)


def test_a_run_goes_on_when_an_engine_and_then_the_router_is_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("routed")
    write_task(folder / "runs/countdown-task")
    run = Training(
        CommandLine(folder),
        "sglang",
        "routed",
        "rollout.engines=2",
        "rollout.server.router=round_robin",
        "train.steps=2000",  # more than are taken until all are back, however fast
    )
    run.until("step=1/")
    servers = [server[0] for server in run.servers()]
    (router,) = [server for server in servers if "router" in " ".join(server.cmdline())]
    next(server for server in servers if server != router).kill()
    run.until("is lost, another takes its place: its server has ended")
    run.until("step=")
    run.until("serves again")
    run.until("step=")
    router.kill()
    run.until("the router is lost, another takes its place: its server has ended")
    run.until("the router serves again")
    assert_it_goes_on(run, losses=2)
