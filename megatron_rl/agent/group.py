"""The rollouts of one prompt, which may be held between two steps, and the calls of the model that they wait for."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_rl.types import AgentResponse, Ids, Response, SamplingParams


@dataclass(eq=False)
class AgentGroup:
    """The rollouts of one prompt."""

    rollouts: list[Future[AgentResponse]] = field(default_factory=list)
    _held_since: float | None = None
    """Time at which the group was suspended; None while it goes on."""
    _held_before: float = 0.0

    @property
    def ended(self) -> bool:
        return all(rollout.done() for rollout in self.rollouts)

    @property
    def held(self) -> bool:
        return self._held_since is not None

    @property
    def held_seconds(self) -> float:
        """Time for which the group was held so far. It does not count as time of its rollouts."""
        return self._held_before + (0.0 if self._held_since is None else time.monotonic() - self._held_since)

    def hold(self) -> None:
        if self._held_since is None:
            self._held_since = time.monotonic()

    def go_on(self) -> None:
        self._held_before, self._held_since = self.held_seconds, None


@dataclass(eq=False)
class ModelCall:
    """A call of the model by one of the rollouts."""

    group: AgentGroup
    prompt: Ids
    sampling: SamplingParams
    answer: asyncio.Future[Response]
    partial: tuple[Response, ...] = ()
    """The answer so far, if it was stopped when the step had its groups."""

    @property
    def waits(self) -> bool:
        """Whether anybody still waits for the answer; in either thread."""
        return not self.answer.done()
