"""sglang-router between a run and its engines, as the driver sees it: requests go to the router's process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from megatron_rl.cluster.engine_process import EngineProcess

Ask = Callable[..., dict[EngineProcess, Any]]
"""`Engines.ask`."""


class Routing:
    """Keeps the router informed of which engines serve, and of the version of their weights."""

    def __init__(self, router: EngineProcess, ask: Ask) -> None:
        self.router, self._ask = router, ask
        self._resumed: set[EngineProcess] = set()
        """Engines that are not paused, as far as they serve."""
        self._version = 0
        self._reached: set[str] = set()
        """URLs of the servers that the router passes requests on to."""

    def pause(self, engines: Iterable[EngineProcess]) -> None:
        """No request is with any of these engines from here on until `resume`; nor with others, until then."""
        paused = {engine for engine in engines if engine in self._resumed and engine.state == "serving"}
        self._resumed -= paused
        if paused and self.router.state == "serving":
            self.router.state = "stale"
            self._ask([self.router], "pause")

    def resume(self, engines: Iterable[EngineProcess], version: int) -> None:
        """These serve, with weights of this version, as do all others that were not paused."""
        self._resumed |= set(engines)
        self._version = version
        self.refresh(anew=True)

    def refresh(self, *, anew: bool = False) -> None:
        """Tell the router when it was started, or engines have come or gone."""
        self._resumed = {engine for engine in self._resumed if engine.state == "serving"}
        if self.router.state not in ("stale", "serving"):
            return
        servers = [engine.address for engine in self._resumed if engine.address]
        if anew or self.router.state == "stale" or {server.url for server in servers} != self._reached:
            for reached in self._ask([self.router], "serve", servers, self._version).values():
                self._reached = reached
                self.router.serve()
