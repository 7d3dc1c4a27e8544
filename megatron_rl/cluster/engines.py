"""The rollout engines behind one call: prompts shared out, lost engines replaced, no request lost or answered twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from megatron_rl.cluster.engine_hosts import host_engine, host_router, log_file
from megatron_rl.cluster.engine_process import EngineProcess, loss
from megatron_rl.cluster.routing import Routing
from megatron_rl.cluster.runtime import Nodes, as_done, progress_deadline, results
from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.interface import UpdateFailed
from megatron_rl.rollout.servers.server import UNSYNCED, ServerLaunch
from megatron_rl.types import Generation, Prompt, SamplingParams
from megatron_rl.weight_sync.checksums import WeightsDamaged

POLL_SECONDS = 1.0
HALF_UPDATED = (UpdateFailed, WeightsDamaged)


class EnginesLost(UserError):
    """No engine for longer than `rollout.server.outage_seconds`."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt; `sampling.n` responses."""

    number: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    begun: tuple[Generation, ...] = ()
    """What there is of the responses; none yet, or `sampling.n`."""


@dataclass(frozen=True, slots=True)
class Call:
    """Requests an engine is busy with."""

    engine: EngineProcess
    requests: list[Request]


class Engines:
    """All rollout engines of a run."""

    def __init__(
        self,
        rollout: RolloutSettings,
        launch: ServerLaunch,
        logs: Path,
        nodes: Nodes,
        notify: Callable[[str], None] = print,
    ) -> None:
        """`launch` has the model, device and type of the embedded engine too. Raises UserError when one fails to start.

        say: told of every engine that is lost.
        """
        self.embedded = rollout.engine == "transformers"
        self._outage_seconds = rollout.server.outage_seconds
        self._queue: list[Request] = []
        self._enough: int | None = None
        """Groups after which embedded engines may stop; of what is in the queue."""
        self._cutting = False
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._answers: dict[int, list[Generation]] = {}
        self._submitted = 0
        self.refresh: Callable[[], None] = self._serve_as_they_are
        """Gives the weights of the run to engines that are stale."""
        self._served_at = time.monotonic()
        self._engines = [
            EngineProcess(i, partial(host_engine, rollout, launch, logs, nodes, i), notify)
            for i in range(rollout.engines)
        ]
        self._routing: Routing | None = None
        self._losses: dict[ray.ObjectRef, EngineProcess] = {}
        """With a router: what each engine answers when it is lost, as it may be asked for nothing else."""
        if rollout.server.router:
            router = EngineProcess(len(self._engines), partial(host_router, rollout, logs, nodes), notify, "the router")
            self._routing = Routing(router, self.ask)
        self._start(logs)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Generation]]:
        """`sampling.n` responses a prompt, in the prompts' order."""
        numbers = self.submit(prompts, sampling)
        waiting = set(numbers)
        while waiting:
            waiting -= self.wait(waiting)
        return [self.take(number) for number in numbers]

    # ------------------------------------------------------------------ requests

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        begun: Sequence[tuple[Generation, ...]] | None = None,
        enough: int | None = None,
    ) -> list[int]:
        """Have responses sampled. Returns a number for each prompt, to `wait` for and `take` its group by.

        begun: for each prompt, what there is of its responses, to be gone on with. enough: embedded engines stop when
        so many groups are whole; servers go on until `cut`.
        """
        numbers = range(self._submitted, self._submitted + len(prompts))
        self._submitted += len(prompts)
        for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
            own = sampling if self.embedded else sampling.reseeded(i)
            self._queue.append(Request(number, prompt.token_ids, own, begun[i] if begun else ()))
        self._enough = enough
        self._dispatch()
        return list(numbers)

    def wait(self, numbers: Iterable[int]) -> set[int]:
        """Those of the numbers whose groups are there, at least one; of embedded engines, which answer batch by batch,
        all. Raises EnginesLost."""
        numbers, hope = set(numbers), progress_deadline()
        while len(there := numbers & self._answers.keys()) < (len(numbers) if self.embedded else min(1, len(numbers))):
            progress = self._poll()
            if hope:
                hope.check(progress=progress)
        return there

    def take(self, number: int) -> list[Generation]:
        return self._answers.pop(number)

    def cut(self, numbers: Iterable[int]) -> None:
        """Have servers stop where they are: `take` gives what there is of these groups and of any other under way."""
        missing = set(numbers) - self._answers.keys()
        self._cutting = True
        while missing:
            self.ask({call.engine for call in self._calls.values()}, "cut")
            self._poll()
            missing -= self._answers.keys()
        self._cutting = False

    def _dispatch(self) -> None:
        """Queued requests to engines that serve: to the embedded ones in as few batches as can be, to a server or to
        the router each by itself, as servers batch them better."""
        if self._cutting:
            self._answers |= {request.number: list(request.begun) for request in self._queue}
            self._queue = []
        serving = self._serving
        if not serving or not self._queue or not self._routed:
            return
        queue, self._queue = self._queue, []
        if self.embedded:
            enough, self._enough = self._enough, None
            for i, engine in enumerate(serving):
                share = None if enough is None else len(range(i, enough, len(serving)))
                self._call(engine, queue[i :: len(serving)], share)
            return
        if self._routing:
            for request in queue:
                self._call(self._routing.router, [request])
            return
        busy = {engine.number: 0 for engine in serving}
        for call in self._calls.values():
            busy[call.engine.number] += len(call.requests)
        for request in queue:
            engine = min(serving, key=lambda engine: busy[engine.number])
            busy[engine.number] += 1
            self._call(engine, [request])

    def _call(self, engine: EngineProcess, requests: list[Request], enough: int | None = None) -> None:
        if requests:
            sampling = requests[0].sampling
            if self.embedded:
                sampling = sampling.reseeded(engine.number)
            prompts, begun = [request.prompt for request in requests], [request.begun for request in requests]
            ref = engine.call("generate", prompts, sampling, begun, enough)
            self._calls[ref] = Call(engine, requests)

    # ------------------------------------------------------------------ engines that come and go

    def _poll(self) -> bool:
        """Wait a moment for anything to happen, and act on it. Returns whether something did."""
        starting = {process.started: process for process in self._processes if process.state == "starting"}
        refs = [*self._calls, *starting, *self._losses]
        if not refs:
            time.sleep(POLL_SECONDS)
        elif ray.wait(refs, timeout=POLL_SECONDS)[0]:
            refs = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        else:
            refs = []
        for ref in refs:
            if ref in starting:
                self._started(starting[ref])
            elif ref in self._calls:  # not given up with its engine a moment ago
                self._answered(ref)
            elif ref in self._losses:
                self._ended(ref)
        if self.stale:
            self.refresh()
        self._replace_lost()
        if self._routing:
            self._routing.refresh()
        self._dispatch()
        return bool(refs)

    def _answered(self, ref: ray.ObjectRef) -> None:
        call = self._calls.pop(ref)
        try:
            groups = results([ref])[0]
        except Exception as error:
            self._lose(call.engine, error)
            self._queue += call.requests
            return
        for request, group in zip(call.requests, groups, strict=True):
            self._answers[request.number] = group

    def _started(self, process: EngineProcess) -> None:
        try:
            process.address = results([process.started])[0]
        except Exception as error:
            self._lose(process, error)
            return
        process.state = "stale"
        if self._routing and process is not self._routing.router:
            self._losses[process.call("until_lost")] = process

    def _ended(self, loss: ray.ObjectRef) -> None:
        try:
            results([loss])
        except Exception as error:
            self._lose(self._losses[loss], error)

    def _lose(self, engine: EngineProcess, error: Exception) -> None:
        """Raises the error unless it says that the engine is lost."""
        why = loss(error)
        if why is None:
            raise error
        self.give_up(engine, why)

    def give_up(self, engine: EngineProcess, why: str) -> None:
        """Nothing of it is used again: others get what it was asked for, and another takes its place."""
        engine.lose(why)
        for ref, call in list(self._calls.items()):
            if call.engine is engine:
                self._queue += self._calls.pop(ref).requests
        self._losses = {ref: process for ref, process in self._losses.items() if process is not engine}

    def _serve_as_they_are(self) -> None:
        """Without a trainer: the weights are those of the folder that the engines were started from."""
        self.resume(self.stale, UNSYNCED)

    def _replace_lost(self) -> None:
        if self._serving and self._routed:
            self._served_at = time.monotonic()
        elif time.monotonic() - self._served_at > self._outage_seconds:
            raise EnginesLost(
                f"no engine could be brought back for {self._outage_seconds:g} s (rollout.server.outage_seconds); "
                "their logs say why"
            )
        for process in self._processes:
            process.launch_when_due()

    @property
    def _processes(self) -> list[EngineProcess]:
        """The router comes first: it starts in a moment, or not at all."""
        return [*([self._routing.router] if self._routing else []), *self._engines]

    @property
    def _routed(self) -> bool:
        """Whether requests can be sent, as far as that depends on a router."""
        return self._routing is None or self._routing.router.state == "serving"

    @property
    def _serving(self) -> list[EngineProcess]:
        return [engine for engine in self._engines if engine.state == "serving"]

    def _start(self, logs: Path) -> None:
        for process in self._processes:
            try:
                results([process.started])
            except Exception as error:
                if (why := loss(error)) is None:
                    raise
                raise UserError(
                    f"{process.name} did not start: {why}. Its log: {log_file(logs, process.name)}"
                ) from error
            self._started(process)

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> dict[EngineProcess, list[list[Generation]]]:
        """What each engine that serves answers to the same request, beside whatever else it is asked."""
        return self.ask(self._serving, "generate", [prompt.token_ids for prompt in prompts], sampling)

    # ------------------------------------------------------------------ weights

    @property
    def stale(self) -> list[EngineProcess]:
        """Engines that have started and wait for the weights of the run."""
        return [engine for engine in self._engines if engine.state == "stale"]

    @property
    def running(self) -> list[EngineProcess]:
        return [engine for engine in self._engines if engine.state in ("stale", "serving")]

    def ask(self, engines: Iterable[EngineProcess], method: str, *arguments: Any) -> dict[EngineProcess, Any]:
        """The answer of each, all at once. An engine that is lost on the way has none; the answer of one that has
        half of an update is an exception."""
        return self.ask_each({engine: (method, *arguments) for engine in engines})

    def ask_each(
        self, calls: Mapping[EngineProcess, tuple[Any, ...]], failed: Callable[[EngineProcess], object] | None = None
    ) -> dict[EngineProcess, Any]:
        """The same with a call for each: (method, arguments...). failed: told of an engine as soon as its answer is an
        exception, while others may still be at work."""
        engines = {engine.call(*call): engine for engine, call in calls.items()}
        answers = {}
        for ref in as_done(list(engines)):
            engine = engines[ref]
            try:
                answers[engine] = results([ref])[0]
            except Exception as error:
                if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, HALF_UPDATED):
                    answers[engine] = error.cause
                    if failed:
                        failed(engine)
                else:
                    self._lose(engine, error)
        return answers

    def pause(self, engines: Iterable[EngineProcess]) -> list[EngineProcess]:
        """Nothing is generated by these from here on until `resume`. Returns those that are left."""
        engines = list(engines)
        if self._routing:
            self._routing.pause(engines)
        return list(self.ask(engines, "pause"))

    def resume(self, engines: Iterable[EngineProcess], version: int) -> None:
        """These have the weights of this version, as have all others that serve."""
        resumed = list(self.ask(engines, "resume"))
        for engine in resumed:
            engine.serve()
        if self._routing:
            self._routing.resume(resumed, version)

    def close(self) -> None:
        for process in self._processes:
            process.end()
