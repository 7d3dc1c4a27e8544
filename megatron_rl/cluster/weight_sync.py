"""Gives the engines the actor's weights: after every step, and to an engine that takes a lost one's place."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from megatron_rl.cluster.actors import Actors
from megatron_rl.cluster.engine_process import EngineProcess
from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.runtime import results
from megatron_rl.errors import UserError
from megatron_rl.weight_sync.buckets import bucket_specs
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import (
    CollectiveUpdate,
    FolderUpdate,
    GroupMember,
    Pushed,
    StageBuckets,
    WeightsNotSent,
)

TOGETHER, ALONE = 3, 2
"""Attempts of one update with all engines that have not got it, then with each of them by itself: in a broadcast one
that fails makes all fail."""

Answers = dict[EngineProcess, Any]
"""Of the engines that were not lost on the way. An exception is the answer of one that has half of an update."""


class WeightSync(ABC):
    """One a run; a subclass for each way that weights can go. An engine is paused while it takes an update, and serves
    again only with the whole of it."""

    def __init__(self, actors: Actors, engines: Engines, engine_ranks: int, notify: Callable[[str], None]) -> None:
        """engine_ranks: tensor-parallel ranks of an engine. say: told what went wrong and was mended."""
        self.actors, self.engines, self.engine_ranks, self.notify = actors, engines, engine_ranks, notify
        self.version: int | None = None
        """Of the weights that the engines have."""
        self.released = False
        """Whether engines have left their GPUs, and with them their weights."""
        self.sent_bytes = 0
        self.checksums: Checksums | None = None
        """Of `version`, where they were asked for."""
        engines.refresh = self.refresh

    def sync(self, version: int, *, verify: bool) -> dict[str, float]:
        """Bring every running engine to the actor's weights. Returns metrics. Raises UserError when it cannot be done.

        verify: compare checksums of all weights, as sent and as held.
        """
        self.version, self.sent_bytes, self.checksums, self.released = version, 0, None, False
        self._prepare(verify)
        paused = time.perf_counter()
        self._bring(self.engines.running, verify)
        return {
            "perf/seconds_engines_paused": time.perf_counter() - paused,
            "weight_sync/bytes": float(self.sent_bytes),
        }

    def release_memory(self) -> None:
        """Engines leave their GPUs to the actor until the next `sync`."""
        self.engines.ask(self.engines.pause(self.engines.running), "release_memory")
        self.released = True

    def refresh(self) -> None:
        """The same for engines that have started since; before the first `sync` there is nothing to bring."""
        if self.version is not None:
            self._bring(self._needed_for(self.engines.stale), verify=False)

    def close(self) -> None:
        results(self.actors.submit_weights("disconnect_weights"))

    @abstractmethod
    def _prepare(self, verify: bool) -> None:
        """What can be done while engines generate."""

    @abstractmethod
    def _transfer(self, engines: list[EngineProcess], verify: bool) -> Answers:
        """The paused engines take the update."""

    @abstractmethod
    def _needed_for(self, stale: list[EngineProcess]) -> list[EngineProcess]:
        """The engines that take part when these get their weights."""

    def _bring(self, engines: list[EngineProcess], verify: bool) -> None:
        assert self.version is not None
        failed: dict[EngineProcess, Exception] = {}
        for attempt in range(TOGETHER + ALONE):
            failed = {}
            for those in [engines] if attempt < TOGETHER else [[engine] for engine in engines]:
                failed |= self._attempt(those, verify)
            engines = [engine for engine in failed if engine in self.engines.running]
            if not engines:
                return
        for engine in engines:
            self._give_up(engine, failed[engine])

    def _attempt(self, engines: list[EngineProcess], verify: bool) -> dict[EngineProcess, Exception]:
        """Bring it to these. Returns those that are still there and have not got it, each with the reason."""
        assert self.version is not None
        paused = self.engines.pause(engines)
        answers = self._transfer(paused, verify) if paused else {}
        if self.checksums:
            whole = [engine for engine, answer in answers.items() if not isinstance(answer, Exception)]
            answers |= self.engines.ask(whole, "verify_weights", self.version, self.checksums)
        failed = {engine: answer for engine, answer in answers.items() if isinstance(answer, Exception)}
        self.engines.resume([engine for engine in answers if engine not in failed], self.version)
        for engine, failure in failed.items():
            self.notify(f"engine {engine.number} has not got weight version {self.version} whole: {failure}")
        return failed

    def _give_up(self, engine: EngineProcess, failure: Exception) -> None:
        """It fails by itself. A fresh process may do it; where a fresh one does not, and no other engine does either,
        it is not the engine."""
        others = any(other.state == "serving" for other in self.engines.running)
        if not engine.has_served and not others:
            raise UserError(
                f"weights of version {self.version} did not arrive whole in {TOGETHER + ALONE} attempts, last in "
                f"engine {engine.number}: {failure}. The engines' logs may say more; weight_sync.transport=disk does "
                "without a network between actor and engines"
            )
        self.engines.give_up(engine, f"it takes no weights: {failure}")

    def _push(self, verify: bool) -> list[ray.ObjectRef]:
        return self.actors.submit_weights("push_weights", self.version, self.engine_ranks if verify else 0)

    def _pushed(self, refs: list[ray.ObjectRef]) -> list[Pushed]:
        stages = [stage for stage in results(refs) if stage is not None]
        self.sent_bytes += sum(stage.bytes for stage in stages)
        checksums = [stage.checksums for stage in stages if stage.checksums is not None]
        self.checksums = Checksums.merge(checksums) if checksums else None
        return sorted(stages, key=lambda stage: stage.stage)


class FolderSync(WeightSync):
    """Through a folder. The actor writes while engines go on generating; only reading it stops them."""

    def __init__(
        self,
        actors: Actors,
        engines: Engines,
        engine_ranks: int,
        notify: Callable[[str], None],
        *,
        folder: Path,
        bucket_bytes: int,
    ) -> None:
        super().__init__(actors, engines, engine_ranks, notify)
        self._parts: tuple[Path, ...] = ()
        results(actors.submit_weights("connect_weights", [folder] * actors.stages, bucket_bytes))

    def _prepare(self, verify: bool) -> None:
        self._parts = tuple(path for stage in self._pushed(self._push(verify)) for path in stage.parts)

    def _transfer(self, engines: list[EngineProcess], verify: bool) -> Answers:
        assert self.version is not None
        update = FolderUpdate(self.version, self._parts, self.checksums is not None, nbytes=self.sent_bytes)
        return self.engines.ask(engines, "update_weights", update)

    def _needed_for(self, stale: list[EngineProcess]) -> list[EngineProcess]:
        return stale  # what was sent last still lies there


class CollectiveSync(WeightSync):
    """By the first rank of each pipeline stage, in a group of its own with all engines: broadcast, or `mapped` by them
    (`weight_sync/mapped.py`)."""

    def __init__(
        self,
        actors: Actors,
        engines: Engines,
        engine_ranks: int,
        notify: Callable[[str], None],
        *,
        backend: str,
        bucket_bytes: int,
        update_seconds: Callable[[int], float],
        mapped: bool = False,
    ) -> None:
        """update_seconds: how long weights of so many bytes may take."""
        super().__init__(actors, engines, engine_ranks, notify)
        self._backend, self._mapped = backend, mapped
        specs = actors.weight_specs()
        self._bucket_bytes = min(bucket_bytes, max(sum(spec.nbytes for spec in stage) for stage in specs))
        self._buckets = [bucket_specs(stage, bucket_bytes) for stage in specs]
        self._timeout_seconds = update_seconds(sum(spec.nbytes for stage in specs for spec in stage))
        self._members: set[tuple[int, int]] = set()
        """Of the groups: engines, and the processes that they were then."""
        self._stages: tuple[StageBuckets, ...] = ()

    def _prepare(self, verify: bool) -> None:
        """A broadcast has no use for it."""

    def _transfer(self, engines: list[EngineProcess], verify: bool) -> Answers:
        """All of them, or none: who is left of a group that broke meets the others anew."""
        assert self.version is not None
        if self._members != _processes(engines):
            answers = self._meet(engines)
            if failure := _failure(engines, answers):
                return dict.fromkeys(answers, failure)
        update = CollectiveUpdate(self.version, self._stages, take_checksums=verify)
        pushing = self._push(verify)
        answers = self.engines.ask_each(
            {engine: ("update_weights", update) for engine in engines},
            # A sender that waits for it then sees that it is gone, and the others that the sender is.
            failed=lambda engine: self.engines.ask([engine], "join_groups", []),
        )
        failure = _failure(engines, answers)
        broken = _broken(pushing)
        if not broken:
            self._pushed(pushing)
        if failure := failure or broken:
            self._members = set()
            return dict.fromkeys(answers, failure)
        return answers

    def _needed_for(self, stale: list[EngineProcess]) -> list[EngineProcess]:
        return self.engines.running if stale else []  # a group has no room for one more

    def _meet(self, engines: list[EngineProcess]) -> Answers:
        """New groups, one a stage: its sender is rank 0, then come the engines' processes."""
        if self._mapped:  # nobody has memory mapped any more that its owner gives back
            self.engines.ask(engines, "join_groups", [])
        results(self.actors.submit_weights("disconnect_weights"))
        meeting = uuid.uuid4().hex[:8]  # a server that was attached to before knows older names
        senders = [
            GroupMember(
                name=f"weights-{meeting}-{stage}",
                host=host,
                port=port,
                backend=self._backend,
                size=1 + len(engines) * self.engine_ranks,
                rank=0,
                timeout_seconds=self._timeout_seconds,
                mapped=self._mapped,
            )
            for stage, (host, port) in enumerate(self.actors.publishers())
        ]
        connecting = self.actors.submit_weights("connect_weights", senders, self._bucket_bytes)
        calls = {}
        for i, engine in enumerate(engines):
            rank = 1 + i * self.engine_ranks
            calls[engine] = ("join_groups", [replace(sender, rank=rank) for sender in senders])
        answers = self.engines.ask_each(calls)
        if broken := _broken(connecting):
            return dict.fromkeys(answers, broken)
        self._members = _processes(engines)
        self._stages = tuple(
            StageBuckets(sender.name, buckets) for sender, buckets in zip(senders, self._buckets, strict=True)
        )
        return answers


def _processes(engines: Iterable[EngineProcess]) -> set[tuple[int, int]]:
    return {(engine.number, engine.launches) for engine in engines}


def _broken(calls: list[ray.ObjectRef]) -> Exception | None:
    """Why the actor could not do its part, if so."""
    try:
        results(calls)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, WeightsNotSent):
            return error.cause
        raise
    return None


def _failure(engines: Iterable[EngineProcess], answers: Answers) -> Exception | None:
    """Why not all of the engines did it, if so."""
    for engine in engines:
        if engine not in answers:
            return RuntimeError(f"engine {engine.number} was lost meanwhile")
        if isinstance(answers[engine], Exception):
            return answers[engine]
    return None
