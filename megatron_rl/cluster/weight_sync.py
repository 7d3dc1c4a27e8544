"""Brings the actor's weights to the engines: after every step, and to an engine that replaces a lost one."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef

from megatron_rl.actor.interface import ActorRank
from megatron_rl.cluster.actors import Actors
from megatron_rl.cluster.engine_process import EngineProcess
from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.runtime import results, shared
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.interface import Drafts, RolloutEngine
from megatron_rl.weight_sync.buckets import bucket_specs
from megatron_rl.weight_sync.checksums import Checksums
from megatron_rl.weight_sync.transport import (
    CollectiveUpdate,
    FolderUpdate,
    GroupMember,
    GroupTransport,
    NodeFolders,
    Pushed,
    StageBuckets,
    WeightsNotSent,
)

TOGETHER, ALONE = 3, 2
"""Attempts of one update with all engines that lack it, then with each of them alone: in a broadcast, one engine that
fails makes all fail."""

Engine = EngineProcess[RolloutEngine]
Answers = dict[Engine, Any]
"""Answers of the engines that were not lost meanwhile. An exception is the answer of an engine that has only a part of
an update."""


class WeightSync(ABC):
    """Weight updates of a run; each transport has a subclass. An engine is paused while it takes an update, and serves
    again only with the complete update."""

    def __init__(self, actors: Actors, engines: Engines, engine_ranks: int, notify: Callable[[str], None]) -> None:
        """engine_ranks: tensor-parallel ranks of an engine. notify: receives a line about every failed attempt."""
        self.actors, self.engines, self.engine_ranks, self.notify = actors, engines, engine_ranks, notify
        self.version: int | None = None
        """Version of the weights that the engines have."""
        self.released = False
        """Whether engines have released their GPU memory, and with it their weights."""
        self.sent_bytes = 0
        self.checksums: Checksums | None = None
        """Checksums of the weights of `version`, if they were asked for."""
        engines.refresh = self.refresh

    def sync(self, version: int, *, verify: bool) -> dict[str, float]:
        """Brings the actor's weights to every running engine. Returns metrics. Raises UserError if that fails.

        verify: whether to compare the checksums of all weights, as sent and as held.
        """
        drafts = self._drafts()
        self.version, self.sent_bytes, self.checksums, self.released = version, 0, None, False
        self.actors.release_memory()  # before engines that share its GPUs take memory for weights
        self._prepare(verify)
        paused = time.perf_counter()
        self._bring(self.engines.running, verify)
        return {
            "perf/seconds_engines_paused": time.perf_counter() - paused,
            "weight_sync/bytes": float(self.sent_bytes),
        } | drafts

    def _drafts(self) -> dict[str, float]:
        """What speculative decoding did since the last sync, as metrics; none if no engine speculates."""
        answers = self.engines.ask(self.engines.running, RolloutEngine.take_drafts).values()
        total = sum((drafts for drafts in answers if isinstance(drafts, Drafts)), Drafts())
        if not total.proposed:
            return {}
        return {
            "rollout/drafted_tokens": float(total.proposed),
            "rollout/draft_acceptance": total.accepted / total.proposed,
        }

    def release_memory(self) -> None:
        """Leaves the GPUs to the actor until the next `sync`."""
        self.engines.ask(self.engines.pause(self.engines.running), RolloutEngine.release_memory)
        self.released = True

    def refresh(self) -> None:
        """Brings the weights of the last `sync` to engines that have started since."""
        if self.version is not None:
            self._bring(self._needed_for(self.engines.awaiting_weights), verify=False)

    def close(self) -> None:
        results(self.actors.submit(ActorRank.disconnect_weights))

    @abstractmethod
    def _prepare(self, verify: bool) -> None:
        """Does what can be done while engines generate."""

    @abstractmethod
    def _transfer(self, engines: list[Engine], verify: bool) -> Answers:
        """Sends the update to the paused engines."""

    def _forget(self) -> None:
        """Called after an engine did not get an update: the next attempt sends the whole weights."""
        return None

    @abstractmethod
    def _needed_for(self, awaiting: list[Engine]) -> list[Engine]:
        """Returns the engines that must take part when the awaiting ones get their weights."""

    def _bring(self, engines: list[Engine], verify: bool) -> None:
        assert self.version is not None
        failed: dict[Engine, Exception] = {}
        for attempt in range(TOGETHER + ALONE):
            failed = {}
            for group in [engines] if attempt < TOGETHER else [[engine] for engine in engines]:
                failed |= self._attempt(group, verify)
            engines = [engine for engine in failed if engine in self.engines.running]
            if not engines:
                return
        for engine in engines:
            self._give_up(engine, failed[engine])

    def _attempt(self, engines: list[Engine], verify: bool) -> dict[Engine, Exception]:
        """Sends the update to these engines. Returns those that did not get it, though they are not lost, and why."""
        assert self.version is not None
        paused = self.engines.pause(engines)
        answers = self._transfer(paused, verify) if paused else {}
        if self.checksums:
            updated = [engine for engine, answer in answers.items() if not isinstance(answer, Exception)]
            compared = self.engines.ask(updated, RolloutEngine.verify_weights, self.version, self.checksums)
            for engine in (engine for engine, count in compared.items() if count == 0):
                self.notify(
                    f"engine {engine.number} could not compare weight version {self.version} with what was sent; its "
                    "log says why. The log-prob contract still checks what it computes with them"
                )
            answers |= compared
        failed = {engine: answer for engine, answer in answers.items() if isinstance(answer, Exception)}
        if failed:
            self._forget()
        self.actors.release_memory()  # before they take memory for their caches
        self.engines.resume([engine for engine in answers if engine not in failed], self.version)
        for engine, failure in failed.items():
            self.notify(f"engine {engine.number} did not get weight version {self.version} completely: {failure}")
        return failed

    def _give_up(self, engine: Engine, failure: Exception) -> None:
        """Replaces an engine that fails alone. If a fresh engine fails too and no other serves, the cause is not the
        engine, and UserError is raised."""
        others = any(other.state == "serving" for other in self.engines.running)
        if not engine.has_served and not others:
            raise UserError(
                f"weights of version {self.version} did not arrive completely in {TOGETHER + ALONE} attempts, last in "
                f"engine {engine.number}: {failure}. The engines' logs may say more; weight_sync.transport=disk needs "
                "no network between actor and engines"
            )
        self.engines.give_up(engine, f"it cannot take weights: {failure}")

    def _push(self, verify: bool) -> list[ObjectRef[Any]]:
        assert self.version is not None
        return self.actors.submit(ActorRank.push_weights, self.version, self.engine_ranks if verify else 0)

    def _pushed(self, refs: list[ObjectRef[Any]]) -> list[Pushed]:
        stages = [stage for stage in results(refs) if stage is not None]
        self.sent_bytes += sum(stage.bytes for stage in stages)
        checksums = [stage.checksums for stage in stages if stage.checksums is not None]
        self.checksums = Checksums.merge(checksums) if checksums else None
        return sorted(stages, key=lambda stage: stage.stage)


class FolderSync(WeightSync):
    """Sends weights through a folder, or through one folder on each node. The actor writes it while engines generate;
    they pause only to read it."""

    def __init__(
        self,
        actors: Actors,
        engines: Engines,
        engine_ranks: int,
        notify: Callable[[str], None],
        *,
        folder: Path | None,
        bucket_bytes: int,
    ) -> None:
        """folder: a folder that all nodes see; None: one in the shared memory of each node with engines."""
        super().__init__(actors, engines, engine_ranks, notify)
        self._parts: tuple[Path, ...] = ()
        self._folders: dict[int, Path] = {}
        """Node -> its own folder, if nodes have one."""
        places: Sequence[Path | NodeFolders] = [] if folder is None else [folder] * actors.stages
        if folder is None:
            self._folders, places = actors.node_folders()
        results(actors.submit(ActorRank.connect_weights, places, bucket_bytes))

    def _prepare(self, verify: bool) -> None:
        self._parts = tuple(path for stage in self._pushed(self._push(verify)) for path in stage.parts)

    def _transfer(self, engines: list[Engine], verify: bool) -> Answers:
        assert self.version is not None
        update = FolderUpdate(self.version, self._parts, self.checksums is not None, nbytes=self.sent_bytes)
        updates = dict.fromkeys(engines, update)
        if self._folders:
            nodes = self.actors.placement.engines
            updates = {engine: update.at(self._folders[nodes[engine.number]]) for engine in engines}
        calls = {engine: engine.submit(RolloutEngine.update_weights, seen) for engine, seen in updates.items()}
        return dict(self.engines.answers(calls))

    def _needed_for(self, awaiting: list[Engine]) -> list[Engine]:
        return awaiting  # the last update is still in the folder


class CollectiveSync(WeightSync):
    """Sends weights from the first rank of each pipeline stage, in one group per stage with all engines: by a
    broadcast, or through memory that the engines have mapped (`weight_sync/mapped.py`)."""

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
        transport: GroupTransport = "collective",
    ) -> None:
        """update_seconds: longest time that weights of so many bytes may take."""
        super().__init__(actors, engines, engine_ranks, notify)
        self._backend, self._transport = backend, transport
        specs = actors.weight_specs()
        self._bucket_bytes = min(bucket_bytes, max(sum(spec.nbytes for spec in stage) for stage in specs))
        self._buckets = [bucket_specs(stage, bucket_bytes) for stage in specs]
        self._timeout_seconds = update_seconds(sum(spec.nbytes for stage in specs for spec in stage))
        self._members: set[tuple[int, int]] = set()
        """Members of the groups: number of each engine, and of its process at that time."""
        self._stages: tuple[StageBuckets, ...] = ()

    def _prepare(self, verify: bool) -> None:
        """Does nothing: a broadcast needs the engines' part."""

    def _transfer(self, engines: list[Engine], verify: bool) -> Answers:
        """Sends the update to all engines or to none: after a failure, the engines that are left form new groups."""
        assert self.version is not None
        if self._members != _processes(engines):
            answers = self._meet(engines)
            if failure := _failure(engines, answers):
                return dict.fromkeys(answers, failure)
        update = CollectiveUpdate(self.version, self._stages, take_checksums=verify)
        pushing = self._push(verify)
        order = shared(update, len(engines))  # a model with experts has tens of thousands of tensors to name
        updates = {engine: engine.submit(RolloutEngine.update_weights, order) for engine in engines}
        answers = dict(self.engines.answers(updates, self._release))
        failure = _failure(engines, answers)
        broken = _broken(pushing)
        if not broken:
            self._pushed(pushing)
        if failure := failure or broken:
            return dict.fromkeys(answers, failure)
        return answers

    def _release(self, failed: Engine) -> None:
        """Releases those that wait for a failed engine in a broadcast.

        The engine leaves its groups at once, if it is not lost: over gloo, a sender that waits for it notices, and then
        so do the others. Over NCCL nobody notices, and the sender is told.
        """
        self.actors.stop_weights()
        if failed.state != "lost":
            self.engines.ask([failed], RolloutEngine.join_groups, [])

    def _forget(self) -> None:
        """The engines that are left form new groups, which begin with the whole weights, if only changed ones are
        sent."""
        self._members = set()

    def _needed_for(self, awaiting: list[Engine]) -> list[Engine]:
        return self.engines.running if awaiting else []  # a group cannot grow

    def _meet(self, engines: list[Engine]) -> Answers:
        """Forms new groups, one per stage: the sender is rank 0, the engines' processes follow."""
        if self._transport == "cuda_ipc":  # engines unmap memory before its owner frees it
            self.engines.ask(engines, RolloutEngine.join_groups, [])
        results(self.actors.submit(ActorRank.disconnect_weights))
        meeting = uuid.uuid4().hex[:8]  # a server that an earlier run attached to still knows older names
        senders = [
            GroupMember(
                name=f"weights-{meeting}-{stage}",
                host=host,
                port=port,
                backend=self._backend,
                size=1 + len(engines) * self.engine_ranks,
                rank=0,
                timeout_seconds=self._timeout_seconds,
                transport=self._transport,
            )
            for stage, (host, port) in enumerate(self.actors.publishers())
        ]
        connecting = self.actors.submit(ActorRank.connect_weights, senders, self._bucket_bytes)
        calls = {}
        for i, engine in enumerate(engines):
            members = [replace(sender, rank=1 + i * self.engine_ranks) for sender in senders]
            calls[engine] = engine.submit(RolloutEngine.join_groups, members)
        answers: Answers = dict(self.engines.answers(calls))
        if broken := _broken(connecting):
            return dict.fromkeys(answers, broken)
        self._members = _processes(engines)
        self._stages = tuple(
            StageBuckets(sender.name, buckets) for sender, buckets in zip(senders, self._buckets, strict=True)
        )
        return answers


def _processes(engines: Iterable[Engine]) -> set[tuple[int, int]]:
    return {(engine.number, engine.launches) for engine in engines}


def _broken(calls: list[ObjectRef[Any]]) -> Exception | None:
    """Returns why the actor could not send, if it could not."""
    try:
        results(calls)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, WeightsNotSent):
            return error.cause
        raise
    return None


def _failure(engines: Iterable[Engine], answers: Answers) -> Exception | None:
    """Returns why not all of the engines succeeded, if so."""
    for engine in engines:
        if engine not in answers:
            return RuntimeError(f"engine {engine.number} was lost meanwhile")
        if isinstance(answers[engine], Exception):
            return answers[engine]
    return None
