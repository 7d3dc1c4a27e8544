"""One engine's place in a run: the process that is there, and the one that replaces it when it is lost.

The router (`rollout.server.router`) is looked after in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import ray

from megatron_rl.rollout.engines.interface import EngineLost
from megatron_rl.rollout.servers.server import Address

FIRST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 1.0, 60.0
CLOSE_SECONDS = 15.0


class EngineProcess:
    """starting -> stale -> serving -> lost -> starting ... Only one that serves is asked for responses.

    stale: it has started, but not the weights of the run.
    """

    def __init__(
        self, number: int, make: Callable[[], Any], notify: Callable[[str], None], name: str | None = None
    ) -> None:
        """make: a fresh process, hosting an engine that was not started yet. name: for people."""
        self.number, self._make, self._say = number, make, notify
        self.name = name or f"engine {number}"
        self.state: Literal["starting", "stale", "serving", "lost"] = "lost"
        self.losses = 0
        """In a row, without serving in between."""
        self.has_served = False
        """Whether this process ever had the weights of the run."""
        self.agrees = False
        """Whether this process was found to keep the log-prob contract."""
        self.address: Address | None = None
        """Of its server, once it has started."""
        self.launches = 0
        """Processes that there have been in this place; the newest one's number."""
        self._retry_at = 0.0
        self.launch()

    def launch(self) -> None:
        self._process = self._make()
        self.launches += 1
        self.started = self.call("start")
        """Done when it can serve."""
        self.state, self.has_served, self.agrees = "starting", False, False

    def launch_when_due(self) -> None:
        if self.state == "lost" and time.monotonic() >= self._retry_at:
            self.launch()

    def call(self, method: str, *arguments: Any) -> ray.ObjectRef:
        return self._process.call.remote(method, *arguments)

    def serve(self) -> None:
        """It has started, and has the weights of the run."""
        if self.losses:
            self._say(f"{self.name} serves again")
        self.state, self.has_served, self.losses = "serving", True, 0

    def lose(self, why: object) -> None:
        """Nothing of it is used again. It is replaced, at once the first time, later when that did not help."""
        if self.state == "lost":
            return
        wait = min(FIRST_BACK_OFF_SECONDS * 2**self.losses, LONGEST_BACK_OFF_SECONDS) if self.losses else 0.0
        self._say(f"{self.name} is lost, another takes its place: {why}")
        self.state = "lost"
        self.losses += 1
        self._retry_at = time.monotonic() + wait
        self.end()

    def end(self) -> None:
        """End the process, and whatever it started, on a GPU above all."""
        ray.wait([self.call("close")], timeout=CLOSE_SECONDS)
        ray.kill(self._process)


def loss(error: Exception) -> str | None:
    """Why an engine is lost, when that is what a failed call says; None for any other error."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, EngineLost):
        return str(error.cause)
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process has ended"
    return None
