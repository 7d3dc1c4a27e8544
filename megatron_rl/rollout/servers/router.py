"""sglang-router in front of SGLang servers: the router passes each request on to one of them.

All other calls (pauses, weights, health) go to each server directly: see `HttpEngine`. Written for sglang-router 0.3.2.
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
from megatron_rl.rollout.engines.interface import LOOPBACK, Address
from megatron_rl.rollout.engines.sglang.server import SglangServer
from megatron_rl.rollout.servers.liveness import Liveness, log
from megatron_rl.rollout.servers.requests import ServerRequests
from megatron_rl.rollout.servers.server import KEY_VARIABLE, HttpClient, ServerRefused, ServerUnavailable
from megatron_rl.rollout.servers.server_process import ServerProcess, free_port
from megatron_rl.types import Response, SamplingParams

CONTROL_SECONDS = 60.0
"""Time limit of a call without computation, and of registering servers."""
ABORT_SECONDS = 5.0
"""Time limit of one server's answer to an abort."""
LEFT_BEHIND_SECONDS = 10.0
"""Time after which an aborted request that has not returned counts as lost with its server."""

_CHECK_INSTALLED = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang_router') is None)"
_LAUNCH = f"""
import os, sys
from sglang_router.launch_router import launch_router, parse_router_args
key = "run:run:admin:" + os.environ.pop("{KEY_VARIABLE}")
launch_router(parse_router_args([*sys.argv[1:], "--control-plane-api-keys", key]))
"""
"""The key is taken from the environment, since command lines are public in the list of processes."""


def command(settings: ServerSettings, port: int, metrics_port: int) -> list[str]:
    """The command line. Health checks are left to the engines: the router would misjudge servers that load weights."""
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
    """Implements `RequestRouter` with coroutines: samples responses with all servers together. It has no servers, and
    is paused, until the first `serve`."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: ServerProcess | None = None

    # ------------------------------------------------------------------ start and end

    async def start(self) -> None:
        """Returns once the router answers. Raises EngineLost if it does not, UserError if it is not installed."""
        self._liveness = Liveness()
        await _check_installed(self._settings)
        port, key = free_port(), secrets.token_hex(16)
        address = Address(f"http://{LOOPBACK}:{port}", key)
        line = command(self._settings, port, free_port())
        environment = {KEY_VARIABLE: key} | dict.fromkeys(
            ("NO_PROXY", "no_proxy"), "*"
        )  # no proxy between router and servers
        self._process = await ServerProcess.start(line, environment)
        self._liveness.lose_at_end_of(self._process)
        self._servers = RoutedServers(address)
        self._requests = ServerRequests(self._servers, self._settings, self._liveness, ServerUnavailable)
        await self._liveness.begin(self._servers.alive, self._settings.start_timeout_seconds)
        hang_seconds = self._settings.hang_seconds
        self._liveness.lose_when_silent(
            self._servers.alive, hang_seconds, lambda: hang_seconds, lambda: str(self._requests)
        )
        log(f"sglang-router answers at {address.url}")

    async def close(self) -> None:
        """Ends the router; returns once its processes have ended."""
        self._liveness.end()
        if self._process:
            await self._process.stop()
            await self._servers.close()

    # ------------------------------------------------------------------ requests

    async def serve(self, servers: Sequence[Address], version: int) -> set[str]:
        """See `RequestRouter`. Without servers, requests wait."""
        known = self._servers.urls
        try:
            reached = await self._liveness.while_there(self._servers.become(servers))
        except (ServerUnavailable, ServerRefused) as error:
            raise self._liveness.lose(f"it cannot register servers: {error}") from error
        if known - reached and self._settings.urls:  # a server that the run started is ended with its requests
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
        partial: Sequence[Sequence[Response]] = (),
        min_groups: int | None = None,
    ) -> list[list[Response]]:
        """See `RolloutEngine`."""
        return await self._requests.generate(prompts, sampling, partial)

    async def abort(self) -> None:
        """See `RolloutEngine`."""
        await self._requests.abort()

    async def pause(self) -> None:
        """Aborts the requests under way in all servers; they continue after the next `serve`."""
        await self._requests.pause()


class RoutedServers:
    """Several servers behind the router. Implements `RequestServer`."""

    def __init__(self, router: Address) -> None:
        self._control = HttpClient(router)
        self._data = SglangServer(Address(router.url))
        self._servers: dict[str, SglangServer] = {}

    @property
    def urls(self) -> set[str]:
        return set(self._servers)

    async def alive(self) -> None:
        await self._control.get("/liveness", timeout_seconds=CONTROL_SECONDS)

    async def generate(self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float) -> list[Response]:
        return await self._data.generate(prompt, sampling, timeout_seconds)

    async def abort_all(self) -> None:
        """Aborts in each server. A server that does not answer is watched by its own engine."""
        aborts = [asyncio.create_task(server.abort_all()) for server in self._servers.values()]
        if aborts:
            done, late = await asyncio.wait(aborts, timeout=ABORT_SECONDS)
            for abort in late:
                abort.cancel()
            for abort in done:
                if error := abort.exception():
                    log(f"not aborted: {error}")

    async def become(self, servers: Sequence[Address]) -> set[str]:
        """Registers these servers with the router, and no others. Returns the URLs that the router reached in time."""
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
        """Waits for the router, which adds and removes servers in the background."""
        deadline = time.monotonic() + CONTROL_SECONDS
        while (known := await self._known()).keys() != set(urls) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        return known.keys() & set(urls)

    async def _known(self) -> dict[str, str]:
        """The router's own name for each URL."""
        answer = await self._control.get("/workers", timeout_seconds=CONTROL_SECONDS)
        return {worker["url"]: worker["id"] for worker in answer["workers"] if worker["is_healthy"]}

    async def close(self) -> None:
        await self._control.close()
        for server in [self._data, *self._servers.values()]:
            await server.close()


def _interpreter(settings: ServerSettings) -> str:
    return str(settings.python or sys.executable)


async def _check_installed(settings: ServerSettings) -> None:
    process = await asyncio.create_subprocess_exec(_interpreter(settings), "-c", _CHECK_INSTALLED)
    if await process.wait():
        python = _interpreter(settings)
        raise UserError(
            f"rollout.server.router: {settings.router} needs sglang-router, which is not installed for {python}: "
            f"{python} -m pip install sglang-router"
        )
