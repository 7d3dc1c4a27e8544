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
from megatron_rl.rollout.engines.interface import Address
from megatron_rl.rollout.servers.http_engine import HttpEngine
from megatron_rl.rollout.servers.router import Router
from megatron_rl.rollout.servers.server import UNSYNCED, HttpClient, ServerRefused
from megatron_rl.types import Response, SamplingParams
from tests.engines.conftest import Run, launch, server_processes
from tests.engines.test_generate import largest_gap
from tests.engines.updates import in_folder
from tests.patience import command_of

pytestmark = pytest.mark.sglang

SETTINGS = ServerSettings(router="round_robin")
PROMPTS = [(1, 20 + i, 31, 7) for i in range(16)]
SAMPLING = SamplingParams(n=4, max_tokens=56, temperature=1.0, stop_token_ids=(94,), seed=1)


@dataclass
class Routed:
    engines: list[HttpEngine]
    addresses: list[Address]
    router: Router
    version: int = UNSYNCED

    async def begin(self) -> asyncio.Task[list[list[Response]]]:
        """Starts requests that are under way in all servers at once, however fast or busy the machine is."""
        for _ in range(20):
            asking = asyncio.create_task(self.router.generate(PROMPTS, SAMPLING))
            while not asking.done():
                if all(await self.loads()):
                    return asking
        raise AssertionError("requests were never under way in all servers at once")

    async def loads(self) -> list[int]:
        """Number of responses under way in each server, as the server reports it."""
        clients = [HttpClient(address) for address in self.addresses]
        answers = await asyncio.gather(
            *(client.get("/v1/loads?include=core", timeout_seconds=600.0) for client in clients)
        )
        for client in clients:
            await client.close()
        return [sum(load["num_running_reqs"] for load in answer["loads"]) for answer in answers]


@pytest.fixture(scope="module")
def routed(run: Run[Any], model: Path) -> Iterator[Routed]:
    hosts = ("127.0.0.1", "127.0.0.2")  # the addresses of two nodes
    engines = [HttpEngine(launch("sglang", model, server=SETTINGS, host=host)) for host in hosts]
    router = Router(SETTINGS)

    async def start() -> list[Address]:
        addresses = list(await asyncio.gather(*(engine.start() for engine in engines)))
        await router.start()
        await asyncio.gather(*(engine.resume() for engine in engines))
        assert await router.serve(addresses, UNSYNCED) == {address.url for address in addresses}
        return addresses

    async def stop() -> None:
        await asyncio.gather(*(engine.close() for engine in engines), router.close())

    yield Routed(engines, run(start()), router)
    run(stop())


def assert_complete(model: Path, groups: list[list[Response]], version: int) -> None:
    assert [len(group) for group in groups] == [SAMPLING.n] * len(PROMPTS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        longer = [
            tuple(response.token_ids.tolist()) for response in group if len(response) > 2
        ]  # short ones may be equal
        assert len(set(longer)) == len(longer)
        for response in group:
            assert len(response) == SAMPLING.max_tokens or response.token_ids[-1] == 94
            assert response.finish_reason != "abort"
            assert response.weight_versions[-1] == version
        assert largest_gap(model, prompt, group[0], 1.0) < 1e-4


def test_requests_go_to_all_servers_and_log_probs_are_the_policys(routed: Routed, run: Run[Any], model: Path) -> None:
    async def scenario() -> list[list[Response]]:
        return await (await routed.begin())

    assert_complete(model, run(scenario()), routed.version)


def test_requests_without_the_key_are_refused_and_no_command_line_has_a_key(routed: Routed, run: Run[Any]) -> None:
    servers = routed.router._servers
    url = servers._data._http.address.url
    for address, path in ((url, "/workers"), (routed.addresses[1].url, "/generate")):
        stranger = HttpClient(Address(address))
        with pytest.raises(ServerRefused, match="status 401"):
            run(stranger.post(path, {"url": "http://127.0.0.1:9"}, timeout_seconds=600.0))
        run(stranger.close())
    keys = [str(address.key) for address in routed.addresses]
    keys.append(str(servers._control.address.key))
    started = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    lines = [" ".join(command_of(process)) for process in started]
    assert len(lines) > 3 and not any(key in line for key in keys for line in lines)


def test_an_abort_reaches_requests_in_all_servers_and_they_are_continued(
    routed: Routed, run: Run[Any], model: Path
) -> None:
    async def scenario() -> tuple[list[list[Response]], list[list[Response]]]:
        for _ in range(20):
            asking = await routed.begin()
            await routed.router.abort()
            aborted = await asking
            if any(len(g) and g.finish_reason == "abort" for group in aborted for g in group):
                return aborted, await routed.router.generate(PROMPTS, SAMPLING, aborted)
        raise AssertionError("no response was aborted in the middle")

    aborted, complete = run(scenario())
    for before, after in zip(aborted, complete, strict=True):
        for first, last in zip(before, after, strict=True):
            assert last.token_ids[: len(first)].tolist() == first.token_ids.tolist()
    assert_complete(model, complete, routed.version)


def test_an_update_reaches_requests_in_all_servers_and_they_are_continued(
    routed: Routed, run: Run[Any], model: Path, tmp_path: Path
) -> None:
    async def scenario() -> list[list[Response]]:
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
            seen = {run[2] for group in groups for response in group for run in response.version_runs}
            assert seen <= {before, version}
            if any(response.version_changes for group in groups for response in group):
                return groups
        raise AssertionError("no update arrived between two tokens")

    for group in run(scenario()):
        assert [len(g) == SAMPLING.max_tokens or g.token_ids[-1] == 94 for g in group] == [True] * SAMPLING.n


def test_no_request_is_lost_with_a_killed_server(routed: Routed, run: Run[Any], model: Path) -> None:
    """This must be the last test with these two servers."""
    process = routed.engines[0]._process
    assert process is not None
    (first, *_) = server_processes(psutil.Process(process._process.pid))

    async def scenario() -> list[list[Response]]:
        asking = await routed.begin()
        first.kill()
        with pytest.raises(Exception, match="its server has ended"):
            await routed.engines[0].until_lost()
        reached = await routed.router.serve(routed.addresses[1:], routed.version)
        assert reached == {routed.addresses[1].url}
        return await asking

    assert_complete(model, run(scenario()), routed.version)
