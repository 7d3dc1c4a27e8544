"""The rollout engines behind one call: prompts are distributed, lost engines replaced, each request answered once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray import ObjectRef

from megatron_rl.cluster.engine_hosts import host_engine, host_router, log_file
from megatron_rl.cluster.engine_process import E, EngineProcess, failure_reason
from megatron_rl.cluster.routing import Routing
from megatron_rl.cluster.runtime import Nodes, as_done, progress_deadline, results
from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.interface import EngineLaunch, RequestRouter, Responder, RolloutEngine, UpdateFailed
from megatron_rl.rollout.servers.server import UNSYNCED
from megatron_rl.types import Prompt, Response, SamplingParams
from megatron_rl.weight_sync.checksums import WeightsDamaged

R = TypeVar("R")
P = ParamSpec("P")
Groups = list[list[Response]]
Engine = EngineProcess[RolloutEngine]
RouterProcess = EngineProcess[RequestRouter]

POLL_SECONDS = 1.0
HALF_UPDATED = (UpdateFailed, WeightsDamaged)
"""Errors of an engine that works, but has only a part of a weight update."""


class EnginesLost(UserError):
    """There was no engine for longer than `rollout.server.outage_seconds`."""


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A request for the `sampling.n` responses of one prompt."""

    number: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    partial: tuple[Response, ...] = ()
    """Partial responses to continue: `sampling.n`, or none."""


@dataclass(frozen=True, slots=True)
class CallUnderWay:
    """A call of `generate` that has no answer yet, and the requests in it."""

    process: Engine | RouterProcess
    requests: list[PromptRequest]


class Engines:
    """All rollout engines of a run."""

    def __init__(
        self,
        rollout: RolloutSettings,
        launch: EngineLaunch,
        logs: Path,
        nodes: Nodes,
        notify: Callable[[str], None] = print,
    ) -> None:
        """Starts the engines. Raises UserError if one does not start.

        notify: receives a line about every engine that is lost or serves again.
        """
        self.embedded = launch.kind.embedded
        self._outage_seconds = rollout.server.outage_seconds
        self._queue: list[PromptRequest] = []
        self._min_groups: int | None = None
        """Number of complete groups, among those in the queue, after which embedded engines may stop."""
        self._aborting = False
        self._calls: dict[ObjectRef[Groups], CallUnderWay] = {}
        self._answers: dict[int, list[Response]] = {}
        self._submitted = 0
        self.refresh: Callable[[], None] = self._serve_as_they_are
        """Brings the weights of the run to engines that await them."""
        self._served_at = time.monotonic()
        self._engines: list[Engine] = [
            EngineProcess(i, bound(host_engine, launch, logs, nodes, i), notify) for i in range(rollout.engines)
        ]
        self._routing: Routing | None = None
        self._losses: dict[ObjectRef[None], Engine] = {}
        """Calls of `until_lost`, if there is a router: an engine behind a router may get no other call for long."""
        if rollout.server.router:
            router: RouterProcess = EngineProcess(
                len(self._engines), bound(host_router, rollout.server, logs, nodes), notify, "the router"
            )
            self._routing = Routing(router, self.ask)
        self._start(logs)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Groups:
        """Samples `sampling.n` responses for each prompt; returns them in the prompts' order."""
        ids = self.submit(prompts, sampling)
        waiting = set(ids)
        while waiting:
            waiting -= self.wait(waiting)
        return [self.take(request) for request in ids]

    # ------------------------------------------------------------------ requests

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        partial: Sequence[tuple[Response, ...]] | None = None,
        min_groups: int | None = None,
    ) -> list[int]:
        """Requests `sampling.n` responses for each prompt. Returns an id for each prompt, for `wait` and `take`.

        partial: for each prompt, the partial responses to continue, or none. min_groups: the number of complete groups
        after which embedded engines stop; servers continue until `abort`.
        """
        ids = range(self._submitted, self._submitted + len(prompts))
        self._submitted += len(prompts)
        for i, (number, prompt) in enumerate(zip(ids, prompts, strict=True)):
            own = sampling if self.embedded else sampling.reseeded(i)
            self._queue.append(PromptRequest(number, prompt.token_ids, own, partial[i] if partial else ()))
        self._min_groups = min_groups
        self._dispatch()
        return list(ids)

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        """Blocks until at least one of the groups has finished, or for about so many seconds, and returns the finished
        ids. Embedded engines answer batch by batch: with them it blocks until all have finished. `seconds` 0: the actor
        is at work, whose weights no engine gets now. Raises EnginesLost, if `seconds` is not 0."""
        ids, deadline = set(ids), progress_deadline()
        while len(finished := ids & self._answers.keys()) < (len(ids) if self.embedded else min(1, len(ids))):
            progress = self._poll(POLL_SECONDS if seconds is None else seconds, actor_works=seconds == 0)
            if deadline:
                deadline.check(progress=progress)
            if seconds is not None:
                return ids & self._answers.keys()
        return finished

    def take(self, request: int) -> list[Response]:
        """Returns the group of a finished request, once."""
        return self._answers.pop(request)

    def abort(self, ids: Iterable[int]) -> None:
        """Stops all requests under way, these and others; `take` then returns the responses with the tokens sampled so
        far."""
        missing = set(ids) - self._answers.keys()
        self._aborting = True
        while missing:
            self._abort_calls()
            self._poll()
            missing -= self._answers.keys()
        self._aborting = False

    def suspend(self, ids: Iterable[int]) -> set[int]:
        """Stops these requests as `abort` does, and returns those that `take` has an answer to: all of them."""
        ids = set(ids)
        self.abort(ids)
        return ids

    def cancel(self, ids: Iterable[int]) -> None:
        """Ends these requests to servers alone, whose answers nobody takes. Not for embedded engines, which work on a
        whole batch at a time."""
        gone = set(ids)
        self._queue = [request for request in self._queue if request.number not in gone]
        for ref, call in list(self._calls.items()):
            if gone.issuperset(request.number for request in call.requests):
                ray.cancel(ref)
                del self._calls[ref]
        for number in gone:
            self._answers.pop(number, None)

    def _abort_calls(self) -> None:
        busy = {call.process for call in self._calls.values()}
        if self._routing and self._routing.router in busy:
            self.ask([self._routing.router], Responder.abort)
        self.ask([engine for engine in self._engines if engine in busy], Responder.abort)

    def _dispatch(self) -> None:
        """Sends queued requests to serving engines: to embedded engines in as few batches as possible, to a server or
        the router one by one, since servers batch them better."""
        if self._aborting:
            self._answers |= {request.number: list(request.partial) for request in self._queue}
            self._queue = []
        serving = self._serving
        if not serving or not self._queue or not self._routed:
            return
        queue, self._queue = self._queue, []
        if self.embedded:
            min_groups, self._min_groups = self._min_groups, None
            for i, engine in enumerate(serving):
                share = None if min_groups is None else len(range(i, min_groups, len(serving)))
                self._call(engine, queue[i :: len(serving)], share)
            return
        if self._routing:
            for request in queue:
                self._call(self._routing.router, [request])
            return
        busy = {engine.number: 0 for engine in serving}
        for call in self._calls.values():
            busy[call.process.number] += len(call.requests)
        for request in queue:
            engine = min(serving, key=lambda engine: busy[engine.number])
            busy[engine.number] += 1
            self._call(engine, [request])

    def _call(
        self, process: Engine | RouterProcess, requests: list[PromptRequest], min_groups: int | None = None
    ) -> None:
        if requests:
            sampling = requests[0].sampling
            if self.embedded:
                sampling = sampling.reseeded(process.number)
            prompts, partial = [request.prompt for request in requests], [request.partial for request in requests]
            ref = process.submit(Responder.generate, prompts, sampling, partial, min_groups)
            self._calls[ref] = CallUnderWay(process, requests)

    # ------------------------------------------------------------------ engines that come and go

    def _poll(self, seconds: float = POLL_SECONDS, *, actor_works: bool = False) -> bool:
        """Waits up to so many seconds for an answer of any process, and acts on it. Returns whether there was one."""
        starting = {process.started: process for process in self._processes if process.state == "starting"}
        refs: list[ObjectRef[Any]] = [*self._calls, *starting, *self._losses]
        if not refs:
            time.sleep(seconds)
        elif ray.wait(refs, timeout=seconds)[0]:
            refs = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        else:
            refs = []
        for ref in refs:
            if ref in starting:
                self._started(starting[ref])
            elif ref in self._calls:  # unless it was given up with its engine a moment ago
                self._answered(ref)
            elif ref in self._losses:
                self._ended(ref)
        if not actor_works and self.awaiting_weights:
            self.refresh()
        self._check_outage(raises=not actor_works)
        for process in self._processes:
            process.launch_when_due()
        if self._routing:
            self._routing.refresh()
        self._dispatch()
        return bool(refs)

    def _answered(self, ref: ObjectRef[Groups]) -> None:
        call = self._calls.pop(ref)
        try:
            groups = results([ref])[0]
        except Exception as error:
            self._lose(call.process, error)
            self._queue += call.requests
            return
        _check_answer(call.process, groups, [request.sampling.n for request in call.requests])
        for request, group in zip(call.requests, groups, strict=True):
            self._answers[request.number] = group

    def _started(self, process: Engine | RouterProcess) -> None:
        try:
            process.address = results([process.started])[0]
        except Exception as error:
            self._lose(process, error)
            return
        process.state = "awaiting_weights"
        if self._routing:
            self._losses |= {e.submit(RolloutEngine.until_lost): e for e in self._engines if e is process}

    def _ended(self, loss: ObjectRef[None]) -> None:
        try:
            results([loss])
        except Exception as error:
            self._lose(self._losses[loss], error)

    def _lose(self, process: EngineProcess[Any], error: Exception) -> None:
        """Gives the process up if the error says that it is lost; raises any other error."""
        reason = failure_reason(error)
        if reason is None:
            raise error
        self.give_up(process, reason)

    def give_up(self, process: EngineProcess[Any], reason: str) -> None:
        """Ends the process and has it replaced. Its requests go to others."""
        process.lose(reason)
        for ref, call in list(self._calls.items()):
            if call.process is process:
                self._queue += self._calls.pop(ref).requests
        self._losses = {ref: engine for ref, engine in self._losses.items() if engine is not process}

    def _serve_as_they_are(self) -> None:
        """Lets engines serve the weights of the folder that they were started from, if there is no trainer."""
        self.resume(self.awaiting_weights, UNSYNCED)

    def _check_outage(self, *, raises: bool) -> None:
        if self._serving and self._routed:
            self._served_at = time.monotonic()
        elif raises and time.monotonic() - self._served_at > self._outage_seconds:
            raise EnginesLost(
                f"no engine could be brought back for {self._outage_seconds:g} s (rollout.server.outage_seconds); "
                "their logs say why"
            )

    @property
    def _processes(self) -> list[Engine | RouterProcess]:
        """All processes, the router first: it starts or fails at once."""
        return [*([self._routing.router] if self._routing else []), *self._engines]

    @property
    def _routed(self) -> bool:
        """Whether the router accepts requests; True without a router."""
        return self._routing is None or self._routing.router.state == "serving"

    @property
    def _serving(self) -> list[Engine]:
        return [engine for engine in self._engines if engine.state == "serving"]

    def _start(self, logs: Path) -> None:
        for process in self._processes:
            try:
                results([process.started])
            except Exception as error:
                if (reason := failure_reason(error)) is None:
                    raise
                raise UserError(
                    f"{process.name} did not start: {reason}. Its log: {log_file(logs, process.name)}"
                ) from error
            self._started(process)

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> dict[Engine, Groups]:
        """Requests the same responses from each serving engine, in addition to its other requests."""
        answers = self.ask(self._serving, Responder.generate, [prompt.token_ids for prompt in prompts], sampling)
        found = {engine: groups for engine, groups in answers.items() if not isinstance(groups, Exception)}
        for engine, groups in found.items():
            _check_answer(engine, groups, [sampling.n] * len(prompts))
        return found

    # ------------------------------------------------------------------ weights

    @property
    def awaiting_weights(self) -> list[Engine]:
        """Engines that have started and wait for the weights of the run."""
        return [engine for engine in self._engines if engine.state == "awaiting_weights"]

    @property
    def running(self) -> list[Engine]:
        return [engine for engine in self._engines if engine.state in ("awaiting_weights", "serving")]

    def ask(
        self,
        processes: Iterable[EngineProcess[E]],
        method: Callable[Concatenate[E, P], R],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> dict[EngineProcess[E], R | Exception]:
        """Calls a method of all these processes at once and returns their `answers`."""
        return self.answers({process: process.submit(method, *arguments, **named) for process in processes})

    def answers(
        self,
        calls: Mapping[EngineProcess[E], ObjectRef[R]],
        failed: Callable[[EngineProcess[E]], object] | None = None,
    ) -> dict[EngineProcess[E], R | Exception]:
        """Waits for submitted calls. The answer of a process that is lost meanwhile is missing; the answer of an engine
        that has only a part of an update is one of HALF_UPDATED. Raises any other error of a call.

        failed: receives an engine as soon as it is lost or its answer is an exception, while others may still be at
        work.
        """
        processes = {ref: process for process, ref in calls.items()}
        answers: dict[EngineProcess[E], R | Exception] = {}
        for ref in as_done(processes.keys()):
            process = processes[ref]
            try:
                answers[process] = results([ref])[0]
            except Exception as error:
                if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, HALF_UPDATED):
                    answers[process] = error.cause
                else:
                    self._lose(process, error)
                if failed:
                    failed(process)
        return answers

    def pause(self, engines: Iterable[Engine]) -> list[Engine]:
        """Stops these engines from sampling until `resume`. Returns those that are not lost."""
        engines = list(engines)
        if self._routing:
            self._routing.pause(engines)
        return list(self.ask(engines, Responder.pause))

    def resume(self, engines: Iterable[Engine], version: int) -> None:
        """Lets engines sample that have the weights of this version, as all other serving engines do."""
        resumed = []
        for engine, answer in self.ask(engines, RolloutEngine.resume).items():
            if isinstance(answer, Exception):
                self.give_up(engine, f"it does not resume: {answer}")
            else:
                engine.serve()
                resumed.append(engine)
        if self._routing:
            self._routing.resume(resumed, version)

    def close(self) -> None:
        for process in self._processes:
            process.end()


def _check_answer(process: EngineProcess[Any], groups: Sequence[Sequence[Response]], sizes: Sequence[int]) -> None:
    """Raises UserError unless there is a group of each size and every token has a log-prob. An engine that breaks the
    interface is not asked again, because its next answer would be no better."""
    if fault := next(_faults(groups, sizes), None):
        raise UserError(
            f"{process.name} returned {fault}. The method `generate` of the engine (rollout.engine) is wrong: it must "
            "return sampling.n responses to each prompt, with a log-prob for every token"
        )


def _faults(groups: Sequence[Sequence[Response]], sizes: Sequence[int]) -> Iterator[str]:
    if len(groups) != len(sizes):
        yield f"{len(groups)} groups for {len(sizes)} prompts"
    for group, size in zip(groups, sizes, strict=False):
        if len(group) != size:
            yield f"{len(group)} responses to a prompt, but sampling.n is {size}"
        for response in group:
            if len(response.log_probs) != len(response):
                yield f"{len(response.log_probs)} log-probs for a response of {len(response)} tokens"
