"""Requests to a server: asked again when they fail, cut and gone on with, each answered once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.servers.liveness import Liveness, log
from megatron_rl.rollout.servers.server import UNSYNCED, ServerUnavailable
from megatron_rl.types import Generation, SamplingParams

T = TypeVar("T")

FIRST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 0.5, 30.0


class Generates(Protocol):
    """A server, or several behind one address; see `Server`."""

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, timeout_seconds: float
    ) -> list[Generation]: ...

    async def abort_all(self) -> None: ...


class Requests:
    """Paused until the first `resume`."""

    def __init__(
        self,
        server: Generates,
        settings: ServerSettings,
        liveness: Liveness,
        of_other_weights: Callable[[str], Exception],
    ) -> None:
        """of_other_weights: what to raise when an answer is: EngineLost, or ServerUnavailable to ask again."""
        self._server, self._settings, self._liveness, self._of_other_weights = (
            server,
            settings,
            liveness,
            of_other_weights,
        )
        self.version: int | None = UNSYNCED
        """Of the weights that answers must be of. None: there are no such."""
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._under_way: set[asyncio.Timeout] = set()
        """One for each request that was sent."""
        self._calls = 0
        """Of `generate`, under way."""
        self._cutting = False

    def __str__(self) -> str:
        return f"{len(self._under_way)} requests under way"

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, begun: Sequence[Sequence[Generation]] = ()
    ) -> list[list[Generation]]:
        """See `RolloutEngine`. Requests wait while they are paused, and go on from where a pause cut them."""
        groups = (
            self._group(prompt, sampling.reseeded(i), begun[i] if begun else ()) for i, prompt in enumerate(prompts)
        )
        self._calls += 1
        try:
            return await self._liveness.while_there(_all(groups))
        finally:
            self._calls -= 1

    async def cut(self) -> None:
        """See `RolloutEngine`."""
        paused, self._cutting = not self._open.is_set(), True
        self._open.set()  # who waits there is cut as well
        try:
            while self._calls:
                await self._liveness.while_there(self._abort_until_idle(self._settings.hang_seconds))
                await asyncio.sleep(0.01)
        finally:
            self._cutting = False
            if paused:
                self._open.clear()

    async def pause(self, patience_seconds: float | None = None) -> None:
        """Cut what is under way: its tokens so far are kept, the rest is sampled after `resume`, by the new weights if
        there are any. What does not come back for so long (unset: `hang_seconds`) is asked for anew."""
        self._open.clear()
        await self._liveness.while_there(self._abort_until_idle(patience_seconds or self._settings.hang_seconds))

    def resume(self) -> None:
        self._open.set()

    # ------------------------------------------------------------------ one of them

    async def _group(
        self, prompt: Sequence[int], sampling: SamplingParams, begun: Sequence[Generation]
    ) -> list[Generation]:
        answers = begun or await self._ask(prompt, sampling)
        return await _all(self._finish(prompt, sampling.reseeded(i), a) for i, a in enumerate(answers))

    async def _finish(self, prompt: Sequence[int], sampling: SamplingParams, generation: Generation) -> Generation:
        """Go on with a response until it has an end of its own."""
        while generation.finish_reason == "abort" and not self._cutting:
            done = len(generation.token_ids)
            if done == sampling.max_tokens:
                return generation.followed_by(Generation([], [], "length", generation.weight_version))
            rest = sampling.reseeded(done).remaining(done)
            generation = generation.followed_by((await self._ask([*prompt, *generation.token_ids], rest))[0])
        return generation

    async def _ask(self, prompt: Sequence[int], sampling: SamplingParams) -> list[Generation]:
        """One request, asked again with growing pauses when it fails."""
        attempts = self._settings.request_attempts
        for attempt in range(attempts):
            await self._open.wait()
            if self._cutting:
                return [Generation([], [], "abort", self.version or 0)] * sampling.n
            try:
                answers = await self._send(prompt, sampling)
                self._check(answers, sampling)
                return answers
            except ServerUnavailable as error:
                log(f"request failed, attempt {attempt + 1} of {attempts}: {error}")
            pause = min(FIRST_BACK_OFF_SECONDS * 2**attempt, LONGEST_BACK_OFF_SECONDS)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        raise self._liveness.lose(f"a request failed {attempts} times")

    async def _send(self, prompt: Sequence[int], sampling: SamplingParams) -> list[Generation]:
        limit = asyncio.timeout(None)
        self._under_way.add(limit)
        self._idle.clear()
        try:
            async with limit:
                return await self._server.generate(prompt, sampling, self._settings.request_timeout_seconds)
        except TimeoutError as error:
            raise ServerUnavailable("it did not come back when it was cut") from error
        finally:
            self._under_way.remove(limit)
            if not self._under_way:
                self._idle.set()

    def _check(self, answers: list[Generation], sampling: SamplingParams) -> None:
        """What no server may get wrong. Weights that are not ours mean that one was restarted behind our back."""
        for answer in answers:
            if len(answer.log_probs) != len(answer.token_ids) or len(answer.token_ids) > sampling.max_tokens:
                raise RuntimeError(
                    f"the server answered with {len(answer.token_ids)} tokens and {len(answer.log_probs)} log-probs, "
                    f"at most {sampling.max_tokens} were asked for"
                )
            if answer.token_ids and answer.weight_versions[-1] != self.version:
                raise self._of_other_weights(f"it serves weights {answer.weight_versions[-1]}, not {self.version}")
        if len(answers) != sampling.n:
            raise RuntimeError(f"the server gave {len(answers)} responses, {sampling.n} were asked for")

    async def _abort_until_idle(self, patience_seconds: float) -> None:
        """Again and again: a request may be on its way to the server, or between its prefill and its n samples."""
        begun = time.monotonic()
        while self._under_way:
            with suppress(ServerUnavailable):  # then it is on its way to be given up
                await self._server.abort_all()
            if time.monotonic() - begun > patience_seconds:
                for limit in self._under_way:
                    limit.reschedule(0.0)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 0.2)


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order. When one fails, the others are cancelled and its error is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
