"""Requests to a server: retried when they fail, aborted and continued, each answered once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import response_of
from megatron_rl.rollout.servers.liveness import Liveness, log
from megatron_rl.rollout.servers.server import UNSYNCED, RequestServer, ServerUnavailable
from megatron_rl.types import Response, SamplingParams
from megatron_rl.utils.back_off import back_off_seconds

T = TypeVar("T")

FIRST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 0.5, 30.0


class ServerRequests:
    """All requests to a server, or to a router; paused until the first `resume`."""

    def __init__(
        self,
        server: RequestServer,
        settings: ServerSettings,
        liveness: Liveness,
        wrong_version: Callable[[str], Exception],
    ) -> None:
        """wrong_version: makes the error for an answer by weights of another version: EngineLost, or ServerUnavailable
        to have the request retried."""
        self._server, self._settings, self._liveness = server, settings, liveness
        self._wrong_version = wrong_version
        self.version: int | None = UNSYNCED
        """Weight version that answers must have; None while the server has only a part of an update."""
        self._open, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._under_way: set[asyncio.Timeout] = set()
        """Time limit of each request that was sent."""
        self._calls = 0
        """Number of calls of `generate` under way."""
        self._aborting = False

    def __str__(self) -> str:
        return f"{len(self._under_way)} requests under way"

    async def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, partial: Sequence[Sequence[Response]] = ()
    ) -> list[list[Response]]:
        """See `RolloutEngine`. Requests wait while paused, and continue from where a pause stopped them."""
        groups = (
            self._group(prompt, sampling.reseeded(i), partial[i] if partial else ()) for i, prompt in enumerate(prompts)
        )
        self._calls += 1
        try:
            return await self._liveness.while_there(_all(groups))
        finally:
            self._calls -= 1

    async def abort(self) -> None:
        """See `RolloutEngine`."""
        paused, self._aborting = not self._open.is_set(), True
        self._open.set()  # requests that wait for `resume` are aborted too
        try:
            while self._calls:
                await self._liveness.while_there(self._abort_until_idle(self._settings.hang_seconds))
                await asyncio.sleep(0.01)
        finally:
            self._aborting = False
            if paused:
                self._open.clear()

    async def pause(self, limit_seconds: float | None = None) -> None:
        """Aborts the requests under way and keeps their tokens; the rest is sampled after `resume`, by the newest
        weights. A request that does not return within the limit (unset: `hang_seconds`) is made again."""
        self._open.clear()
        await self._liveness.while_there(self._abort_until_idle(limit_seconds or self._settings.hang_seconds))

    def hold(self) -> None:
        """Makes new requests wait until `resume`. The server keeps those that are under way, or answers them."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    # ------------------------------------------------------------------ one request

    async def _group(
        self, prompt: Sequence[int], sampling: SamplingParams, partial: Sequence[Response]
    ) -> list[Response]:
        answers = partial or await self._ask(prompt, sampling)
        return await _all(self._finish(prompt, sampling.reseeded(i), a) for i, a in enumerate(answers))

    async def _finish(self, prompt: Sequence[int], sampling: SamplingParams, response: Response) -> Response:
        """Continues a response until it is complete."""
        while response.finish_reason == "abort" and not self._aborting:
            done = len(response)
            if done == sampling.max_tokens:
                return replace(response, finish_reason="length")
            rest = sampling.reseeded(done).remaining(done)
            response = response.followed_by((await self._ask([*prompt, *response.token_ids.tolist()], rest))[0])
        return response

    async def _ask(self, prompt: Sequence[int], sampling: SamplingParams) -> list[Response]:
        """Makes one request, and retries it with growing pauses if it fails."""
        attempts = self._settings.request_attempts
        for attempt in range(attempts):
            await self._open.wait()
            if self._aborting:
                return [response_of([], [], "abort", self.version or 0)] * sampling.n
            oldest = self.version
            try:
                answers = await self._send(prompt, sampling)
                self._check(answers, sampling, oldest)
                return answers
            except ServerUnavailable as error:
                log(f"request failed, attempt {attempt + 1} of {attempts}: {error}")
            pause = back_off_seconds(attempt + 1, first=FIRST_BACK_OFF_SECONDS, longest=LONGEST_BACK_OFF_SECONDS)
            await asyncio.sleep(pause)
        raise self._liveness.lose(f"a request failed {attempts} times")

    async def _send(self, prompt: Sequence[int], sampling: SamplingParams) -> list[Response]:
        limit = asyncio.timeout(None)
        self._under_way.add(limit)
        self._idle.clear()
        try:
            async with limit:
                return await self._server.generate(prompt, sampling, self._settings.request_timeout_seconds)
        except TimeoutError as error:
            raise ServerUnavailable("it did not return when it was aborted") from error
        finally:
            self._under_way.remove(limit)
            if not self._under_way:
                self._idle.set()

    def _check(self, answers: list[Response], sampling: SamplingParams, oldest: int | None) -> None:
        """Raises an error if the answers break the interface, or come from weights of another version, as after a
        restart that the run does not know of. oldest: version when the request was sent; updates since then are known.
        """
        known = [version for version in (oldest, self.version) if version is not None]
        for answer in answers:
            if len(answer.log_probs) != len(answer) or len(answer) > sampling.max_tokens:
                raise RuntimeError(
                    f"the server answered with {len(answer)} tokens and {len(answer.log_probs)} log-probs, "
                    f"at most {sampling.max_tokens} tokens were requested"
                )
            newest = answer.version_runs[-1][2]
            if len(answer) and not (known and min(known) <= newest <= max(known)):
                raise self._wrong_version(f"it serves weights {newest}, not {self.version}")
        if len(answers) != sampling.n:
            raise RuntimeError(f"the server gave {len(answers)} responses, {sampling.n} were requested")

    async def _abort_until_idle(self, limit_seconds: float) -> None:
        """Aborts repeatedly: a request may be on its way to the server, or between its prefill and its n samples."""
        start = time.monotonic()
        while self._under_way:
            with suppress(ServerUnavailable):  # the watch on its signs of life gives the server up if need be
                await self._server.abort_all()
            if time.monotonic() - start > limit_seconds:
                for limit in self._under_way:
                    limit.reschedule(0.0)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 0.2)


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Returns the results in order. If one fails, the others are cancelled and its own error is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
