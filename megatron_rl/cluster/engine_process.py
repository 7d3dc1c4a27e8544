"""One engine's place in a run: the process that is there, and the process that replaces it once it is lost.

The router (`rollout.server.router`) is supervised in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Concatenate, Generic, Literal, ParamSpec, TypeVar

import ray
from ray import ObjectRef

from megatron_rl.cluster.runtime import HostedProcess
from megatron_rl.rollout.engines.interface import Address, EngineLost, Responder
from megatron_rl.utils.back_off import back_off_seconds

E = TypeVar("E", bound=Responder)
R = TypeVar("R")
P = ParamSpec("P")

FIRST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 2.0, 60.0
"""Pause before a second replacement, and before any later one. The first replacement follows at once."""
CLOSE_SECONDS = 15.0


class EngineProcess(Generic[E]):
    """starting -> awaiting_weights -> serving -> lost -> starting ... Only a serving engine gets requests.

    awaiting_weights: the engine has started, but does not have the weights of the run yet.
    """

    def __init__(
        self,
        number: int,
        make: Callable[[], HostedProcess[E]],
        notify: Callable[[str], None],
        name: str | None = None,
    ) -> None:
        """make: starts a fresh process with an engine on which `start` was not called yet. name: name in messages."""
        self.number, self._make, self._notify = number, make, notify
        self.name = name or f"engine {number}"
        self.state: Literal["starting", "awaiting_weights", "serving", "lost"] = "lost"
        self.losses = 0
        """Losses in a row, without serving in between."""
        self.has_served = False
        """Whether this process ever had the weights of the run."""
        self.agrees = False
        """Whether this process was found to keep the log-prob contract."""
        self.address: Address | None = None
        """Address of its server, once it has started."""
        self.launches = 0
        """Processes started in this place so far, which is also the number of the newest one."""
        self._retry_at = 0.0
        self.launch()

    def launch(self) -> None:
        self._process = self._make()
        self.launches += 1
        self.started = self.submit(Responder.start)
        """Its answer comes when the process can serve."""
        self.state, self.has_served, self.agrees = "starting", False, False

    def launch_when_due(self) -> None:
        if self.state == "lost" and time.monotonic() >= self._retry_at:
            self.launch()

    def submit(self, method: Callable[Concatenate[E, P], R], *arguments: P.args, **named: P.kwargs) -> ObjectRef[R]:
        """Calls a method of the engine, such as `submit(RolloutEngine.pause)`, without waiting for the answer."""
        return self._process.submit(method, *arguments, **named)

    def serve(self) -> None:
        """Marks the engine as serving: it has started, and has the weights of the run."""
        if self.losses:
            self._notify(f"{self.name} serves again")
        self.state, self.has_served, self.losses = "serving", True, 0

    def lose(self, reason: str) -> None:
        """Ends the process, which is not used again. It is replaced at once after a first loss, later after others."""
        if self.state == "lost":
            return
        wait = 0.0
        if self.losses:
            wait = back_off_seconds(
                self.losses, first=FIRST_BACK_OFF_SECONDS, longest=LONGEST_BACK_OFF_SECONDS, jitter=False
            )
        self._notify(f"{self.name} is lost, another takes its place: {reason}")
        self.state = "lost"
        self.losses += 1
        self._retry_at = time.monotonic() + wait
        self.end()

    def end(self) -> None:
        """Ends the process and whatever it started, so that no GPU stays in use."""
        ray.wait([self.submit(Responder.close)], timeout=CLOSE_SECONDS)
        self._process.kill()


def failure_reason(error: Exception) -> str | None:
    """Returns the reason if a failed call's error means that the engine is lost; None for any other error."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, EngineLost):
        return str(error.cause)
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process has ended"
    return None
