"""sglang-router between a run and its engines, as the driver sees it: requests go to the router's process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from megatron_rl.cluster.engine_process import E, EngineProcess
from megatron_rl.rollout.engines.interface import RequestRouter, Responder, RolloutEngine

R = TypeVar("R")
P = ParamSpec("P")


class Ask(Protocol):
    """`Engines.ask`."""

    def __call__(
        self,
        processes: Iterable[EngineProcess[E]],
        method: Callable[Concatenate[E, P], R],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> dict[EngineProcess[E], R | Exception]: ...


class Routing:
    """Keeps the router informed about which engines serve, and about the version of their weights."""

    def __init__(self, router: EngineProcess[RequestRouter], ask: Ask) -> None:
        self.router, self._ask = router, ask
        self._resumed: set[EngineProcess[RolloutEngine]] = set()
        """Serving engines that are not paused."""
        self._version = 0
        self._reached: set[str] = set()
        """URLs of the servers that the router passes requests on to."""

    def pause(self, engines: Iterable[EngineProcess[RolloutEngine]]) -> None:
        """Stops all requests until `resume`, so that none is under way in these engines."""
        paused = {engine for engine in engines if engine in self._resumed and engine.state == "serving"}
        self._resumed -= paused
        if paused and self.router.state == "serving":
            self.router.state = "awaiting_weights"
            self._ask([self.router], Responder.pause)

    def resume(self, engines: Iterable[EngineProcess[RolloutEngine]], version: int) -> None:
        """These engines serve with weights of this version, as do all others that were not paused."""
        self._resumed |= set(engines)
        self._version = version
        self.refresh(weights_changed=True)

    def refresh(self, *, weights_changed: bool = False) -> None:
        """Informs the router if it is new, or if engines or weights have changed."""
        self._resumed = {engine for engine in self._resumed if engine.state == "serving"}
        if self.router.state not in ("awaiting_weights", "serving"):
            return
        servers = [engine.address for engine in self._resumed if engine.address]
        known = self.router.state == "serving" and {server.url for server in servers} == self._reached
        if known and not weights_changed:
            return
        for reached in self._ask([self.router], RequestRouter.serve, servers, self._version).values():
            if isinstance(reached, set):
                self._reached = reached
                self.router.serve()
