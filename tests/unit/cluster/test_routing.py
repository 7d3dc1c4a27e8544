"""Which engines the router is told of, and when requests must not go on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_rl.cluster.routing import Routing
from megatron_rl.rollout.servers.server import Address


@dataclass(eq=False)
class Process:
    url: str
    state: str = "stale"
    calls: list[Any] = field(default_factory=list)

    @property
    def address(self) -> Address:
        return Address(self.url)

    def serve(self) -> None:
        self.state = "serving"


class Run:
    """Two engines and a router, all just started."""

    def __init__(self) -> None:
        self.router, self.engines = Process("router"), [Process("a"), Process("b")]
        self.dead = False
        router: Any = self.router
        self.routing = Routing(router, self._ask)

    def _ask(self, processes: Iterable[Process], method: str, *arguments: Any) -> dict[Process, Any]:
        (router,) = processes
        if self.dead:
            router.state = "lost"
            return {}
        if method == "serve":
            servers, version = arguments
            urls = {server.url for server in servers}
            router.calls.append(("serve", urls, version))
            return {router: urls}
        router.calls.append(method)
        return {router: None}

    def resume(self, engines: list[Process], version: int) -> None:
        for engine in engines:
            engine.serve()
        resumed: Any = engines
        self.routing.resume(resumed, version)

    def pause(self, engines: list[Process]) -> None:
        paused: Any = engines
        self.routing.pause(paused)


@pytest.fixture
def run() -> Run:
    run = Run()
    run.resume(run.engines, 1)
    return run


def test_an_update_of_all_of_them(run: Run) -> None:
    run.pause(run.engines)
    assert run.router.state == "stale", "no request is sent while weights change"
    run.resume(run.engines, 2)
    assert run.router.state == "serving"
    assert run.router.calls == [("serve", {"a", "b"}, 1), "pause", ("serve", {"a", "b"}, 2)]


def test_one_that_has_half_of_an_update_is_left_out_until_it_has_the_whole(run: Run) -> None:
    run.pause(run.engines)
    run.resume(run.engines[:1], 2)
    run.pause(run.engines[1:])
    run.resume(run.engines[1:], 2)
    assert run.router.calls[1:] == ["pause", ("serve", {"a"}, 2), ("serve", {"a", "b"}, 2)]


def test_one_that_is_lost_is_taken_out_and_put_back(run: Run) -> None:
    run.engines[0].state = "lost"
    run.routing.refresh()
    run.routing.refresh()
    run.engines[0].state, run.engines[0].url = "stale", "c"
    run.routing.refresh()
    run.pause(run.engines[:1])
    run.resume(run.engines[:1], 1)
    assert run.router.calls[1:] == [("serve", {"b"}, 1), ("serve", {"b", "c"}, 1)]


def test_a_router_that_is_replaced_is_told_of_all(run: Run) -> None:
    run.router.state = "starting"
    run.routing.refresh()
    assert len(run.router.calls) == 1
    run.router.state = "stale"
    run.routing.refresh()
    assert run.router.calls[1:] == [("serve", {"a", "b"}, 1)] and run.router.state == "serving"


def test_a_router_that_dies_in_an_update_is_told_of_the_new_weights(run: Run) -> None:
    run.dead = True
    run.pause(run.engines)
    run.resume(run.engines, 2)
    assert run.router.state == "lost"
    run.dead, run.router.state = False, "stale"
    run.routing.refresh()
    assert run.router.calls[1:] == [("serve", {"a", "b"}, 2)]
