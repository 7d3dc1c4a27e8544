"""Who does not have the key gets nothing from a server: neither on its own port, nor on any other one that it opens."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import aiohttp
import psutil
import pytest
from torch.distributed import TCPStore

from megatron_rl.rollout.servers.http_engine import HttpEngine
from tests.engines.conftest import Run, printed, server_processes
from tests.engines.their_routes import WEBSOCKET

OPEN = {
    "sglang": {("GET", "/health"), ("GET", "/health_generate"), ("GET", "/ready"), (WEBSOCKET, "/v1/realtime")},
    "vllm": set(),
}
"""Routes that a server answers without the key: SGLang cannot be told otherwise. They say whether the server works, and
the websocket is for speech, which no model of this project takes."""
REFUSED = (401, 403)


async def statuses(url: str, routes: list[tuple[str, str]], headers: dict[str, str]) -> dict[tuple[str, str], int]:
    """The status of each route's answer; 101 for a websocket that opens."""
    found = {}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(600)) as session:
        for method, path in routes:
            if method == WEBSOCKET:
                try:
                    async with session.ws_connect(url + path):
                        found[method, path] = 101
                except aiohttp.WSServerHandshakeError as error:
                    found[method, path] = error.status
            else:
                async with session.request(method, url + path, allow_redirects=False) as answer:
                    found[method, path] = answer.status
    return found


@cache
def routes(kind: str) -> list[tuple[str, str]]:
    """The routes of the server's own application, whose modules list them; listing them takes long."""
    return [(method, path) for method, path in printed("routes:", "tests.engines.their_routes", kind)]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}], ids=["no key", "a wrong key"])
def test_no_route_answers_without_the_key(engine: HttpEngine, run: Run[Any], headers: dict[str, str]) -> None:
    kind = engine.kind.name
    assert len(routes(kind)) > 50 and ("POST", "/v1/completions") in routes(kind)
    address = engine._server._http.address  # type: ignore[attr-defined]
    assert address.key
    found = run(statuses(address.url, [*routes(kind), ("POST", "/arrays/generate"), ("GET", "/no/such/path")], headers))
    assert {route for route, status in found.items() if status not in REFUSED} == OPEN[kind]
    assert run(engine.health()) is not None


def test_other_ports_of_a_server_are_closed_to_other_machines(engine: HttpEngine) -> None:
    """One kind of port cannot be closed, and docs/engines.md says so: the store by which a server's ranks find each
    other. torch gives it no address to listen on."""
    assert engine._process is not None
    processes = server_processes(psutil.Process(engine._process._process.pid))
    assert processes
    listening = {
        (connection.laddr.ip, connection.laddr.port, process.name())
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    ours = int(engine._server._http.address.url.rpartition(":")[2])  # type: ignore[attr-defined]
    assert ours in {port for _, port, _ in listening}
    for _, port, _ in (entry for entry in listening if entry[0] not in ("127.0.0.1", "::1")):
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=600))
        assert engine.kind.name == "sglang" and store.num_keys(), "this port is no store of torch"
