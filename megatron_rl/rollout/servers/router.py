"""sglang-router in front of SGLang servers: requests go to it, and it passes each on to one of them.

What is not a request (pauses, weights, health) goes to each server directly: see `HttpEngine`. As of sglang-router
0.3.2.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import sys
import time
from collections.abc import Collection, Sequence

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.sglang.server import SglangServer
from megatron_rl.rollout.servers.liveness import Liveness, log
from megatron_rl.rollout.servers.requests import Requests
from megatron_rl.rollout.servers.server import (
    KEY_VARIABLE,
    LOOPBACK,
    Address,
    HttpClient,
    ServerRefused,
    ServerUnavailable,
)
from megatron_rl.rollout.servers.server_process import ServerProcess, free_port
from megatron_rl.types import Generation, SamplingParams

CONTROL_SECONDS = 60.0
"""Longest time for a call that computes nothing, and for servers to be taken in."""
ABORT_SECONDS = 5.0
"""Longest time that one server's answer to an abort is waited for."""
LEFT_BEHIND_SECONDS = 10.0
"""After this, what does not come back when all is cut is with a server that is gone."""

_IS_THERE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang_router') is None)"
_LAUNCH = f"""
import os, sys
from sglang_router.launch_router import launch_router, parse_router_args
key = "run:run:admin:" + os.environ.pop("{KEY_VARIABLE}")
launch_router(parse_router_args([*sys.argv[1:], "--control-plane-api-keys", key]))
"""
"""Its key is taken from the environment: a list of processes, with their command lines, is public."""


def command(settings: ServerSettings, port: int, metrics_port: int) -> list[str]:
    """The command line. That servers are well is judged by us alone: while they take weights, the router could not."""
    arguments = {
        "--host": LOOPBACK,
        "--port": str(port),
        "--prometheus-host": LOOPBACK,
        "--prometheus-port": str(metrics_port),
        "--policy": str(settings.router),
        "--request-timeout-secs": str(math.ceil(settings.request_timeout_seconds)),
        "--shutdown-grace-period-secs": "1",
        "--log-level": "warn",
    }
    line = [_interpreter(settings), "-c", _LAUNCH, *(word for pair in arguments.items() for word in pair)]
    return [*line, "--disable-health-check", "--disable-circuit-breaker"]


class Router:
    """What generates, of a `RolloutEngine`, for all servers together; each method a coroutine. It has no servers, and
    is paused, until the first `serve`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: ServerProcess | None = None

    # ------------------------------------------------------------------ its life

    async def start(self) -> None:
        """Return when it answers. Raises EngineLost when it does not, UserError when it is not installed."""
        self._liveness = Liveness()
        await _check_installed(self._settings)
        port, key = free_port(), secrets.token_hex(16)
        address = Address(f"http://{LOOPBACK}:{port}", key)
        line = command(self._settings, port, free_port())
        environment = {KEY_VARIABLE: key} | dict.fromkeys(("NO_PROXY", "no_proxy"), "*")  # none between it and servers
        self._process = await ServerProcess.start(line, environment)
        self._liveness.lose_at_end_of(self._process)
        self._servers = RoutedServers(address)
        self._requests = Requests(self._servers, self._settings, self._liveness, ServerUnavailable)
        await self._liveness.begin(self._servers.alive, self._settings.start_timeout_seconds)
        hang_seconds = self._settings.hang_seconds
        self._liveness.lose_when_silent(
            self._servers.alive, hang_seconds, lambda: hang_seconds, lambda: str(self._requests)
        )
        log(f"sglang-router answers at {address.url}")

    async def close(self) -> None:
        """Returns when its processes are gone."""
        self._liveness.end()
        if self._process:
            await self._process.stop()
            await self._servers.close()

    # ------------------------------------------------------------------ requests

    async def serve(self, servers: Sequence[Address], version: int) -> set[str]:
        """Pass requests on to these servers, all of which have the weights of this version; wait while there is none.
        Returns the URLs of those that the router could reach. Raises EngineLost."""
        known = self._servers.urls
        try:
            reached = await self._liveness.while_there(self._servers.become(servers))
        except (ServerUnavailable, ServerRefused) as error:
            raise self._liveness.lose(f"it took no servers: {error}") from error
        if known - reached and self._settings.urls:  # those that are ours were ended, and their requests with them
            await self._requests.pause(LEFT_BEHIND_SECONDS)
        self._requests.version = version
        if reached:
            self._requests.resume()
        else:
            await self._requests.pause(LEFT_BEHIND_SECONDS)
        return reached

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        begun: Sequence[Sequence[Generation]] = (),
        enough: int | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine`."""
        return await self._requests.generate(prompts, sampling, begun)

    async def cut(self) -> None:
        """See `RolloutEngine`."""
        await self._requests.cut()

    async def pause(self) -> None:
        """Cut what is under way, wherever it is; it goes on after the next `serve`."""
        await self._requests.pause()


class RoutedServers:
    """Several servers as one; what `Requests` needs of a server."""

    def __init__(self, router: Address) -> None:
        self._control = HttpClient(router)
        self._data = SglangServer(Address(router.url))
        self._servers: dict[str, SglangServer] = {}

    @property
    def urls(self) -> set[str]:
        return set(self._servers)

    async def alive(self) -> None:
        await self._control.get("/liveness", timeout_seconds=CONTROL_SECONDS)

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float
    ) -> list[Generation]:
        return await self._data.generate(prompt, sampling, timeout_seconds)

    async def abort_all(self) -> None:
        """By each of the servers. One that does not answer has its own watch."""
        aborts = [asyncio.create_task(server.abort_all()) for server in self._servers.values()]
        if aborts:
            done, late = await asyncio.wait(aborts, timeout=ABORT_SECONDS)
            for abort in late:
                abort.cancel()
            for abort in done:
                if error := abort.exception():
                    log(f"not aborted: {error}")

    async def become(self, servers: Sequence[Address]) -> set[str]:
        """Have the router know these and no others. Returns the URLs of those that it could reach in time."""
        wanted = {server.url: server for server in servers}
        known = await self._known()
        for url in known.keys() - wanted.keys():
            await self._control.delete(f"/workers/{known[url]}", timeout_seconds=CONTROL_SECONDS)
        for url in wanted.keys() - known.keys():
            body = {"url": url} | ({"api_key": wanted[url].key} if wanted[url].key else {})
            await self._control.post("/workers", body, timeout_seconds=CONTROL_SECONDS)
        reached = await self._until_known(wanted.keys())
        for url in self.urls - wanted.keys():
            await self._servers.pop(url).close()
        self._servers |= {url: SglangServer(wanted[url]) for url in reached - self.urls}
        return reached

    async def _until_known(self, urls: Collection[str]) -> set[str]:
        """It takes servers in, and lets them go, when it comes to it."""
        deadline = time.monotonic() + CONTROL_SECONDS
        while (known := await self._known()).keys() != set(urls) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return known.keys() & set(urls)

    async def _known(self) -> dict[str, str]:
        """URL -> the router's own name for it."""
        answer = await self._control.get("/workers", timeout_seconds=CONTROL_SECONDS)
        return {worker["url"]: worker["id"] for worker in answer["workers"] if worker["is_healthy"]}

    async def close(self) -> None:
        await self._control.close()
        for server in [self._data, *self._servers.values()]:
            await server.close()


def _interpreter(settings: ServerSettings) -> str:
    return str(settings.python or sys.executable)


async def _check_installed(settings: ServerSettings) -> None:
    process = await asyncio.create_subprocess_exec(_interpreter(settings), "-c", _IS_THERE)
    if await process.wait():
        raise UserError(
            f"rollout.server.router: {settings.router} needs sglang-router, which {_interpreter(settings)} has not: "
            f"{_interpreter(settings)} -m pip install sglang-router"
        )
