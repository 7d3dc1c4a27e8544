"""Which engines the router gets, and when requests must stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_rl.cluster.routing import Routing
from megatron_rl.rollout.engines.interface import Address, RequestRouter


@dataclass(eq=False)
class Process:
    url: str
    state: str = "awaiting_weights"
    calls: list[Any] = field(default_factory=list)

    @property
    def address(self) -> Address:
        return Address(self.url)

    def serve(self) -> None:
        self.state = "serving"


class Run:
    """Two engines and a router, all of which have just started."""

    def __init__(self) -> None:
        self.router, self.engines = Process("router"), [Process("a"), Process("b")]
        self.dead = False
        router: Any = self.router
        ask: Any = self._ask
        self.routing = Routing(router, ask)

    def _ask(self, processes: Iterable[Process], method: Callable[..., Any], *arguments: Any) -> dict[Process, Any]:
        (router,) = processes
        if self.dead:
            router.state = "lost"
            return {}
        if method is RequestRouter.serve:
            servers, version = arguments
            urls = {server.url for server in servers}
            router.calls.append(("serve", urls, version))
            return {router: urls}
        router.calls.append(method.__name__)
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


def test_the_router_pauses_while_all_engines_are_updated(run: Run) -> None:
    run.pause(run.engines)
    assert run.router.state == "awaiting_weights", "requests are sent while weights change"
    run.resume(run.engines, 2)
    assert run.router.state == "serving"
    assert run.router.calls == [("serve", {"a", "b"}, 1), "pause", ("serve", {"a", "b"}, 2)]


def test_an_engine_with_a_partial_update_is_left_out_until_the_update_is_complete(run: Run) -> None:
    run.pause(run.engines)
    run.resume(run.engines[:1], 2)
    run.pause(run.engines[1:])
    run.resume(run.engines[1:], 2)
    assert run.router.calls[1:] == ["pause", ("serve", {"a"}, 2), ("serve", {"a", "b"}, 2)]


def test_a_lost_engine_is_taken_out_and_its_replacement_added(run: Run) -> None:
    run.engines[0].state = "lost"
    run.routing.refresh()
    run.routing.refresh()
    run.engines[0].state, run.engines[0].url = "awaiting_weights", "c"
    run.routing.refresh()
    run.pause(run.engines[:1])
    run.resume(run.engines[:1], 1)
    assert run.router.calls[1:] == [("serve", {"b"}, 1), ("serve", {"b", "c"}, 1)]


def test_a_replaced_router_gets_all_engines(run: Run) -> None:
    run.router.state = "starting"
    run.routing.refresh()
    assert len(run.router.calls) == 1
    run.router.state = "awaiting_weights"
    run.routing.refresh()
    assert run.router.calls[1:] == [("serve", {"a", "b"}, 1)] and run.router.state == "serving"


def test_a_router_that_dies_in_an_update_gets_the_new_weight_version(run: Run) -> None:
    run.dead = True
    run.pause(run.engines)
    run.resume(run.engines, 2)
    assert run.router.state == "lost"
    run.dead, run.router.state = False, "awaiting_weights"
    run.routing.refresh()
    assert run.router.calls[1:] == [("serve", {"a", "b"}, 2)]
