"""Rollouts of agents: each is a coroutine on one event loop, whose calls of the model go to the engines together.

The event loop has a thread of its own. The engines belong to the driver's thread, which passes requests and answers on
while it waits for rollouts, and in an asynchronous run also while it waits for the actor. A rollout may outlive a step:
it is held between steps, or goes on during training, and the weights change between two of its tokens.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from megatron_rl.agent.group import AgentGroup, ModelCall
from megatron_rl.agent.model import Agent, Model
from megatron_rl.agent.server import ModelServer
from megatron_rl.agent.session import LIMIT_CODE, LimitReached, Limits, Session, SessionClosed, first_tokens
from megatron_rl.config.agent import AgentSettings
from megatron_rl.errors import UserError
from megatron_rl.reward.results import plain_text, result_of
from megatron_rl.rollout.engines.interface import response_of
from megatron_rl.types import AgentResponse, Ids, Prompt, Response, RewardResult, SamplingParams

MOMENT_SECONDS = 0.2
"""An embedded engine gets the requests of one moment in one batch: those of all rollouts, or those that have come when
nothing happens for so long because rollouts wait for their tools."""
POLL_SECONDS = 0.05
BLOCKED_SECONDS = 60.0
"""Time after which an agent that blocks the event loop ends the run."""
CLEAN_UP_SECONDS = 5.0
"""Time that a cancelled agent has to end."""
LONGEST_TEXT = 2000
"""Characters of an agent's error that are kept."""
MODEL_NAME = "policy"


class Engines(Protocol):
    """The engines of a run; see `cluster.engines.Engines`."""

    embedded: bool

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        partial: Sequence[tuple[Response, ...]] | None = None,
    ) -> list[int]: ...

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]: ...

    def take(self, request: int) -> list[Response]: ...

    def abort(self, ids: Iterable[int]) -> None: ...

    def cancel(self, ids: Iterable[int]) -> None: ...


class AgentRollouts:
    """Samples responses with an agent; used in the place of the engines. A context manager: nothing outlives it."""

    def __init__(
        self, settings: AgentSettings, agent: Agent, engines: Engines, tokenizer: Any, sequence_tokens: int
    ) -> None:
        """`sequence_tokens`: most tokens of a context and its response together."""
        self.settings, self.agent, self.engines, self.tokenizer = settings, agent, engines, tokenizer
        self._limits = Limits(settings.max_turns, sequence_tokens)
        self._server = ModelServer(settings.host, MODEL_NAME, sequence_tokens)
        self._changed = threading.Condition()
        """Guards the two fields below, which both threads use."""
        self._queue: deque[ModelCall] = deque()
        self._live = 0
        """Rollouts that have not ended."""
        self._asked: dict[int, ModelCall] = {}
        """Requests that the engines work on."""
        self._groups: dict[int, AgentGroup] = {}
        self._submitted = 0
        self._ping, self._answered = threading.Event(), 0.0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agents", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result()
        except OSError as error:
            self._end_loop()
            raise UserError(f"rollout.agent.host: cannot listen on {self.settings.host}: {error}") from error
        self._ping.set()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result(2 * CLEAN_UP_SECONDS)
        except TimeoutError:
            return  # an agent blocks the event loop, whose thread ends with the process
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------------ the driver's thread: groups

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        partial: object = None,
        min_groups: int | None = None,
    ) -> list[int]:
        """Starts `sampling.n` rollouts for each prompt. Returns a number for each prompt, for `wait` and `take`.

        There is nothing partial: a rollout that a step leaves to the next is suspended, and keeps its number.
        """
        numbers = range(self._submitted, self._submitted + len(prompts))
        self._submitted += len(prompts)
        with self._changed:
            self._live += len(prompts) * sampling.n
        for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
            own = [sampling.reseeded(i).reseeded(k) for k in range(sampling.n)]
            group = self._groups[number] = AgentGroup()
            group.rollouts += [
                asyncio.run_coroutine_threadsafe(self._rollout(group, prompt, one), self._loop) for one in own
            ]
            for future in group.rollouts:
                future.add_done_callback(self._ended)
        return list(numbers)

    def wait(self, numbers: Iterable[int]) -> set[int]:
        """Blocks until at least one of the groups has ended, and returns those that have. Suspended ones go on."""
        numbers = set(numbers)
        for number in numbers:
            self._groups[number].go_on()
        while not (ended := self._ended_of(numbers)) and numbers:
            self._pass_on(None if self.engines.embedded else POLL_SECONDS)
        self._cancel_left()
        return ended

    def keep_going(self) -> None:
        """Passes on what has come, and returns soon; for a driver that waits for the actor."""
        self._pass_on(0.0)

    def take(self, number: int) -> list[Response]:
        """Returns the responses of a group that has ended, once. A rollout that was aborted has no tokens."""
        return [_result(future) for future in self._groups.pop(number).rollouts]

    def suspend(self, numbers: Iterable[int]) -> set[int]:
        """Stops what the engines do for these groups, and returns those that have ended. The others are held: the next
        `wait` for them lets them go on, from the last sampled token. Meanwhile their agents may run tools."""
        numbers = set(numbers)
        for number in numbers:
            self._groups[number].hold()
        self.engines.abort(self._asked)
        for number, request in self._asked.items():
            self._received(request, number)
        self._asked = {}
        return self._ended_of(numbers)

    def abort(self, numbers: Iterable[int]) -> None:
        """Ends all rollouts, these and others, and what the engines do for them."""
        for future in [future for group in self._groups.values() for future in group.rollouts]:
            future.cancel()
        with self._changed:
            self._queue.clear()
        self.engines.abort(self._asked)
        for number in self._asked:
            self.engines.take(number)
        self._asked = {}

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Response]]:
        """Samples `sampling.n` responses for each prompt; returns them in the prompts' order."""
        numbers = self.submit(prompts, sampling)
        waiting = set(numbers)
        while waiting:
            waiting -= self.wait(waiting)
        return [self.take(number) for number in numbers]

    # ------------------------------------------------------------------ the driver's thread: requests

    def _ended_of(self, numbers: Iterable[int]) -> set[int]:
        return {number for number in numbers if self._groups[number].ended}

    def _pass_on(self, seconds: float | None) -> None:
        """Passes requests on to the engines, and their answers back. `seconds`: time to wait for an answer; None: until
        there are answers to all."""
        self._check_loop()
        if requests := self._arrived(blocks=seconds != 0.0):
            self._ask(requests)
        self._cancel_left()
        if self._asked:
            for number in self.engines.wait(self._asked, seconds):
                self._received(self._asked.pop(number), number)

    def _received(self, request: ModelCall, number: int) -> None:
        """Delivers an answer of the engines, or keeps the tokens of one that was stopped, which is asked for again."""
        (response,) = self.engines.take(number)
        if response.finish_reason == "abort":
            request.partial = (response,) if len(response) else ()
            with self._changed:
                self._queue.append(request)
            return
        if len(response) > request.sampling.max_tokens:
            response = first_tokens(response, request.sampling.max_tokens, "length")
        self._loop.call_soon_threadsafe(_deliver, request.answer, response)

    def _cancel_left(self) -> None:
        """Ends what the engines do for calls that nobody waits for any more: their rollout or client is gone."""
        if left := [number for number, request in self._asked.items() if not request.waits]:
            self.engines.cancel(left)
            for number in left:
                del self._asked[number]

    def _arrived(self, *, blocks: bool) -> list[ModelCall]:
        """Requests to pass on; those of held groups stay. Unless an embedded engine is at work, which should get all
        requests of a moment at once, it waits for the moment to pass. `blocks`: whether to wait a little for one."""
        with self._changed:
            if self.engines.embedded:
                if self._asked:
                    return []
                while self._live and len(self._queue) < self._live and self._changed.wait(MOMENT_SECONDS):
                    pass
            elif blocks and not self._asked and all(request.group.held for request in self._queue):
                self._changed.wait(POLL_SECONDS)
            waiting = [request for request in self._queue if request.waits]
            self._queue = deque(request for request in waiting if request.group.held)
        return [request for request in waiting if not request.group.held]

    def _ask(self, requests: list[ModelCall]) -> None:
        """Requests that differ in their token limits alone share a batch of an embedded engine; longer answers are then
        cut, and a prefix of a sample is itself a sample."""
        batches: dict[object, list[ModelCall]] = {}
        for number, request in enumerate(requests):
            alike = request.sampling.stop_token_ids if self.engines.embedded else number
            batches.setdefault(alike, []).append(request)
        for batch in batches.values():
            batch.sort(key=lambda request: request.sampling.seed)  # the order of their arrival is left to chance
            sampling = replace(batch[0].sampling, max_tokens=max(request.sampling.max_tokens for request in batch))
            prompts = [Prompt("", tuple(request.prompt.tolist()), "", None) for request in batch]
            numbers = self.engines.submit(prompts, sampling, [request.partial for request in batch])
            self._asked |= zip(numbers, batch, strict=True)

    def _check_loop(self) -> None:
        """Raises UserError, with the place, if an agent keeps the event loop from running."""
        if self._ping.is_set():
            self._ping.clear()
            self._answered = time.monotonic()
            self._loop.call_soon_threadsafe(self._ping.set)
        elif time.monotonic() - self._answered > BLOCKED_SECONDS:
            frame = sys._current_frames().get(self._thread.ident or 0)
            stack = "".join(traceback.format_stack(frame)[-3:]) if frame else "its end"
            raise UserError(
                f"rollout.agent.function={self.settings.function!r}: the agent has blocked all rollouts for "
                f"{BLOCKED_SECONDS:g} s. Await what takes long, and give the rest to asyncio.to_thread. It is at\n"
                f"{stack}"
            )

    def _ended(self, future: Future[AgentResponse]) -> None:
        """Counts a rollout that has ended or was cancelled; in either thread."""
        with self._changed:
            self._live -= 1
            self._changed.notify()

    # ------------------------------------------------------------------ the event loop's thread

    async def _rollout(self, group: AgentGroup, prompt: Prompt, sampling: SamplingParams) -> AgentResponse:
        answers: set[asyncio.Future[Response]] = set()
        session = Session(self.tokenizer, partial(self._sample, group, answers), sampling, self._limits)
        model = Model(session, self._server.open(session), MODEL_NAME)
        try:
            reward = await self._run(group, model, prompt)
        finally:
            session.closed = True
            self._server.close(session)
            for answer in answers:  # of calls that outlive the rollout; the engines stop working on them
                _refuse(answer)
        if reward is None and not session.recording.num_sampled_tokens:
            reached = session.limit_reached
            why = (
                "the rollout reached a limit before its first token"
                if reached
                else "the agent has not called the model"
            )
            reward = RewardResult(0.0, detail=why, outcome="error")
        return session.recorded(prompt.token_ids, reward, self.settings.graded)

    async def _run(self, group: AgentGroup, model: Model, prompt: Prompt) -> RewardResult | None:
        """Returns the agent's reward, or why there is none; None if the verifier grades the rollout."""
        task = asyncio.ensure_future(self._call(model, prompt))
        end = time.monotonic() + self.settings.timeout_seconds - group.held_seconds
        try:
            while not (ended := task.done()) and (left := end + group.held_seconds - time.monotonic()) > 0:
                await asyncio.wait({task}, timeout=max(left, POLL_SECONDS))
        finally:
            if not task.done():  # the rollout took too long, or is aborted
                model.session.closed = True
                task.cancel()
                await asyncio.wait({task}, timeout=CLEAN_UP_SECONDS)
        if not ended:
            seconds = f"{self.settings.timeout_seconds:g} s (rollout.agent.timeout_seconds)"
            return RewardResult(0.0, detail=f"the rollout took more than {seconds}", outcome="timeout")
        try:
            value = task.result()
            return None if value is None else result_of(value)
        except BaseException as error:  # whatever the agent has raised
            if model.session.limit_reached and _is_limit(error):
                return None
            return RewardResult(0.0, detail=_described(error), outcome="error")

    async def _call(self, model: Model, prompt: Prompt) -> Any:
        try:
            return await self.agent(model, prompt)
        except (SystemExit, KeyboardInterrupt) as error:  # they would end the event loop
            raise RuntimeError(f"the agent ended itself with {error!r}") from error

    async def _sample(
        self, group: AgentGroup, answers: set[asyncio.Future[Response]], prompt: Ids, sampling: SamplingParams
    ) -> Response:
        """`answers`: those that the rollout waits for."""
        request = ModelCall(group, prompt, sampling, self._loop.create_future())
        answers.add(request.answer)
        with self._changed:
            self._queue.append(request)
            self._changed.notify()
        try:
            return await request.answer
        finally:
            answers.discard(request.answer)

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=CLEAN_UP_SECONDS)
        await self._server.stop()


def _deliver(answer: asyncio.Future[Response], response: Response) -> None:
    if not answer.done():  # its rollout may have ended meanwhile
        answer.set_result(response)


def _refuse(answer: asyncio.Future[Response]) -> None:
    if not answer.done():
        answer.set_exception(SessionClosed("the rollout has ended"))


def _result(future: Future[AgentResponse]) -> Response:
    try:
        return future.result()
    except CancelledError:
        return response_of([], [], "abort", 0)


def _is_limit(error: BaseException) -> bool:
    """Whether the error is LimitReached, also as the `openai` package raises it, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_limit, error.exceptions))
    return isinstance(error, LimitReached) or getattr(error, "code", None) == LIMIT_CODE


def _described(error: BaseException) -> str:
    """The error, with the line of the agent's own code that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "megatron_rl/agent" not in frame.filename]
    place = f" ({frames[0].filename}, line {frames[0].lineno})" if frames else ""
    try:
        text = plain_text(error)
    except Exception:
        text = "(an error whose text cannot be made)"
    return f"{type(error).__name__}: {text[:LONGEST_TEXT]}{place}"
