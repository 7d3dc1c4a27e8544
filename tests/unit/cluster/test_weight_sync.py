"""Updates that fail midway: every engine that serves has the newest update completely."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.actor.interface import ActorRank
from megatron_rl.cluster import weight_sync
from megatron_rl.cluster.weight_sync import ALONE, TOGETHER, CollectiveSync, FolderSync, WeightSync
from megatron_rl.errors import UserError
from megatron_rl.parallel.placement import Placement
from megatron_rl.rollout.engines.interface import Drafts, RolloutEngine, UpdateFailed
from megatron_rl.weight_sync.checksums import Checksums, WeightsDamaged
from megatron_rl.weight_sync.transport import CollectiveUpdate, GroupTransport, NodeFolders, Pushed

LOST = object()
LOST_ERROR = RuntimeError("lost")
ATTEMPTS = TOGETHER + ALONE


class Engine:
    """An engine with scripted answers to updates and checks; once they are used up, all calls succeed."""

    def __init__(self, number: int, state: str = "serving") -> None:
        self.number, self.state, self.launches = number, state, 1
        self.has_served = False
        self.updates: deque[Any] = deque()
        self.checks: deque[Any] = deque()
        self.drafts = Drafts()
        self.version: int | None = None
        self.calls: list[str] = []
        self.groups: list[Any] = []

    def serve(self) -> None:
        assert self.version is not None, "it serves a partial update"
        self.state, self.has_served = "serving", True

    def submit(self, method: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """The call is made when its answer is waited for."""
        return lambda: self.answer(method.__name__, *arguments)

    def answer(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        if method == "join_groups":
            self.groups = arguments[0]
        if method == "update_weights":
            self.version = None
            if self.updates:
                return self.updates.popleft()
            if isinstance(arguments[0], CollectiveUpdate) and not self.groups:
                return UpdateFailed("it is in no group")
            self.version = arguments[0].version
        if method == "take_drafts":
            return self.drafts
        if method == "verify_weights" and self.checks:
            return self.checks.popleft()
        return None


class Engines:
    def __init__(self, count: int) -> None:
        self.all = [Engine(i) for i in range(count)]
        self.refresh: Callable[[], None] = lambda: None
        self.given_up: list[tuple[int, str]] = []

    @property
    def running(self) -> list[Engine]:
        return [engine for engine in self.all if engine.state in ("awaiting_weights", "serving")]

    @property
    def awaiting_weights(self) -> list[Engine]:
        return [engine for engine in self.all if engine.state == "awaiting_weights"]

    def ask(self, engines: Iterable[Engine], method: Callable[..., Any], *arguments: Any) -> dict[Engine, Any]:
        return self.answers({engine: engine.submit(method, *arguments) for engine in engines})

    def answers(
        self, calls: Mapping[Engine, Callable[[], Any]], failed: Callable[[Engine], object] | None = None
    ) -> dict[Engine, Any]:
        answers = {}
        for engine, call in calls.items():
            answers[engine] = call()
            if answers[engine] is LOST:
                engine.state = "lost"
                del answers[engine]
            if failed and isinstance(answers.get(engine, LOST_ERROR), Exception):
                failed(engine)
        return answers

    def give_up(self, engine: Engine, why: str) -> None:
        engine.state = "lost"
        self.given_up.append((engine.number, why))

    def pause(self, engines: Iterable[Engine]) -> list[Engine]:
        return list(self.ask(engines, RolloutEngine.pause))

    def resume(self, engines: Iterable[Engine], version: int) -> None:
        for engine in self.ask(engines, RolloutEngine.resume):
            engine.serve()


class Actors:
    stages = 2

    def __init__(self) -> None:
        self.pushes = self.released = self.stops = 0
        self.placement = Placement((0, 1), (0, 1, 1), 0, on_gpu=False)

    def node_folders(self) -> tuple[dict[int, Path], list[NodeFolders]]:
        return {0: Path("here"), 1: Path("there")}, [{0: Path("here"), 1: Path("there")}] * self.stages

    def submit(self, method: Callable[..., Any], *arguments: Any) -> list[Any]:
        if method is not ActorRank.push_weights:
            return [None, None]
        self.pushes += 1
        checksums = Checksums({"w": "ab"}, {"0:w": "ab"}) if arguments[1] else None
        return [Pushed(stage, 10, (Path(f"stage-{stage}"),), checksums) for stage in range(self.stages)]

    def release_memory(self) -> None:
        self.released += 1

    def stop_weights(self) -> None:
        self.stops += 1

    def publishers(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", 1), ("127.0.0.1", 2)]

    def weight_specs(self) -> list[list[Any]]:
        return [[], []]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "results", lambda refs: list(refs))
    monkeypatch.setattr(weight_sync, "shared", lambda value, users: value)


@pytest.fixture
def messages() -> list[str]:
    return []


Open = Callable[[int], tuple[WeightSync, Any]]


@pytest.fixture(params=["folder", "folder of each node", "collective", "cuda_ipc"])
def opened(request: pytest.FixtureRequest, messages: list[str]) -> Open:
    def open_sync(count: int) -> tuple[WeightSync, Any]:
        engines: Any = Engines(count)
        actors: Any = Actors()
        if "folder" in request.param:
            folder = Path("f") if request.param == "folder" else None
            return FolderSync(actors, engines, 1, messages.append, folder=folder, bucket_bytes=9), engines
        return collective(actors, engines, messages, request.param), engines

    return open_sync


def collective(
    actors: Any, engines: Any, messages: list[str], transport: GroupTransport = "collective"
) -> CollectiveSync:
    return CollectiveSync(
        actors,
        engines,
        1,
        messages.append,
        backend="gloo",
        bucket_bytes=9,
        update_seconds=lambda nbytes: 1.0,
        transport=transport,
    )


def versions(engines: Engines) -> list[int | None]:
    return [engine.version for engine in engines.running]


def test_every_engine_gets_the_update_while_paused(opened: Open) -> None:
    sync, engines = opened(3)
    metrics = sync.sync(1, verify=True)
    assert versions(engines) == [1, 1, 1]
    assert metrics["weight_sync/bytes"] == 20
    for engine in engines.all:
        order = [call for call in engine.calls if call != "join_groups"]
        assert order == ["take_drafts", "pause", "update_weights", "verify_weights", "resume"]


def test_the_acceptance_of_drafts_is_over_all_engines(opened: Open) -> None:
    sync, engines = opened(3)
    assert "rollout/draft_acceptance" not in sync.sync(1, verify=False)
    engines.all[0].drafts, engines.all[2].drafts = Drafts(30, 12), Drafts(10, 8)
    metrics = sync.sync(2, verify=False)
    assert (metrics["rollout/drafted_tokens"], metrics["rollout/draft_acceptance"]) == (40, 0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_weights_are_sent_again_in_new_groups(messages: list[str], count: int) -> None:
    """In new groups the actor sends the whole weights, also if it sends only changed ones otherwise."""
    engines: Any = Engines(count)
    sync = collective(Actors(), engines, messages, "delta")
    sync.sync(1, verify=False)
    (first,) = {member.name for member in engines.all[0].groups[:1]}
    assert all(member.transport == "delta" for member in engines.all[0].groups)
    sync.sync(2, verify=False)
    assert first == engines.all[0].groups[0].name, "the groups stay as long as nothing fails"
    for engine in engines.all:
        engine.checks.append(WeightsDamaged("w differs"))
    sync.sync(3, verify=True)
    assert first != engines.all[0].groups[0].name
    assert versions(engines) == [3] * count


def test_an_engine_reads_the_folder_of_its_own_node(messages: list[str]) -> None:
    engines: Any = Engines(3)
    actors: Any = Actors()
    sync = FolderSync(actors, engines, 1, messages.append, folder=None, bucket_bytes=9)
    read: dict[int, tuple[Path, ...]] = {}
    for engine in engines.all:
        answer = engine.answer

        def spy(method: str, *rest: Any, answer: Any = answer, number: int = engine.number) -> Any:
            if method == "update_weights":
                read[number] = rest[0].parts
            return answer(method, *rest)

        engine.answer = spy
    sync.sync(1, verify=False)
    parts = ("stage-0", "stage-1")
    assert read == {
        number: tuple(Path(folder) / part for part in parts) for number, folder in enumerate(("here", "there", "there"))
    }


def test_the_actor_frees_memory_before_engines_take_it_for_weights_and_for_caches(opened: Open) -> None:
    sync, engines = opened(1)
    actors: Any = sync.actors
    seen: dict[str, int] = {}
    (engine,) = engines.all
    answer = engine.answer
    engine.answer = lambda method, *rest: (seen.setdefault(method, actors.released), answer(method, *rest))[1]
    sync.sync(1, verify=False)
    assert (seen["update_weights"], seen["resume"]) == (1, 2)


@pytest.mark.parametrize("failures", [1, ATTEMPTS - 1])
def test_a_partial_update_is_made_again(opened: Open, messages: list[str], failures: int) -> None:
    sync, engines = opened(2)
    engines.all[1].updates.extend([UpdateFailed("broke off")] * failures)
    sync.sync(1, verify=False)
    assert versions(engines) == [1, 1]
    assert any("engine 1 did not get weight version 1 completely: broke off" in line for line in messages)


def test_damaged_weights_are_detected_and_sent_again(opened: Open, messages: list[str]) -> None:
    sync, engines = opened(2)
    engines.all[0].checks.append(WeightsDamaged("1 of 1 tensors differ"))
    sync.sync(1, verify=True)
    assert versions(engines) == [1, 1]
    assert messages == ["engine 0 did not get weight version 1 completely: 1 of 1 tensors differ"]


def test_an_engine_that_cannot_take_updates_is_found_and_replaced(opened: Open) -> None:
    """In a broadcast all engines fail with it; those that take the update alone go on serving."""
    sync, engines = opened(3)
    engines.all[1].updates.extend([UpdateFailed("no memory")] * 100)
    sync.sync(1, verify=False)
    assert engines.given_up == [(1, "it cannot take weights: no memory")]
    assert [engine.state for engine in engines.all] == ["serving", "lost", "serving"]
    assert versions(engines) == [1, 1]
    sync.sync(2, verify=False)
    assert versions(engines) == [2, 2]


def test_the_run_ends_when_no_fresh_engine_can_take_the_update(opened: Open) -> None:
    sync, engines = opened(2)
    for engine in engines.all:
        engine.state = "awaiting_weights"
        engine.updates.extend([UpdateFailed("broke off")] * 100)
    with pytest.raises(UserError, match=rf"version 1 did not arrive completely in {ATTEMPTS} attempts"):
        sync.sync(1, verify=False)
    assert not engines.given_up


def test_the_only_engine_is_replaced_once(opened: Open) -> None:
    sync, engines = opened(1)
    (engine,) = engines.all
    sync.sync(1, verify=False)
    engine.updates.extend([UpdateFailed("no memory")] * 100)
    sync.sync(2, verify=False)
    assert engines.given_up == [(0, "it cannot take weights: no memory")]
    engine.state, engine.has_served, engine.launches = "awaiting_weights", False, 2
    with pytest.raises(UserError, match="version 2 did not arrive completely"):
        engines.refresh()


def test_an_engine_that_dies_in_an_update_does_not_block_the_others(opened: Open) -> None:
    sync, engines = opened(3)
    engines.all[1].updates.append(LOST)
    sync.sync(1, verify=True)
    assert engines.all[1].state == "lost"
    assert [engine.number for engine in engines.running] == [0, 2]
    assert versions(engines) == [1, 1]
    if isinstance(sync, CollectiveSync):  # the engines that are left have formed new groups
        assert all(member.size == 3 for engine in engines.running for member in engine.groups)


def test_engines_unmap_memory_before_its_owner_frees_it(messages: list[str]) -> None:
    engines: Any = Engines(1)
    actors: Any = Actors()
    sync = collective(actors, engines, messages, "cuda_ipc")
    held: list[int] = []
    submit = actors.submit

    def watched(method: Callable[..., Any], *arguments: Any) -> list[Any]:
        if method is ActorRank.disconnect_weights:
            held.append(len(engines.all[0].groups))
        return submit(method, *arguments)

    actors.submit = watched
    sync.sync(1, verify=False)
    engines.all[0].launches += 1
    sync.sync(2, verify=False)
    assert held == [0, 0]
    assert all(member.transport == "cuda_ipc" for member in engines.all[0].groups)


def test_a_failed_engine_leaves_its_groups_at_once() -> None:
    """It leaves before the driver waits for the answers of the others, which are blocked by it."""
    engines: Any = Engines(2)
    actors: Any = Actors()
    sync = CollectiveSync(actors, engines, 1, print, backend="gloo", bucket_bytes=9, update_seconds=lambda nbytes: 1.0)
    first, second = engines.all
    first.updates.append(UpdateFailed("broke off"))
    answer, groups = second.answer, []

    def watched(method: str, *arguments: Any) -> Any:
        if method == "update_weights":
            groups.append(list(first.groups))
        return answer(method, *arguments)

    second.answer = watched
    sync.sync(1, verify=False)
    assert groups[0] == [] and len(groups[1]) == 2
    assert versions(engines) == [1, 1]


@pytest.mark.parametrize("failure", [UpdateFailed("broke off"), LOST], ids=["fails", "dies"])
def test_a_sender_that_waits_for_a_failed_engine_is_told(failure: Any) -> None:
    """Over NCCL the sender would wait for ever. A lost engine is asked for nothing more."""
    engines: Any = Engines(2)
    actors: Any = Actors()
    sync = CollectiveSync(actors, engines, 1, print, backend="nccl", bucket_bytes=9, update_seconds=lambda nbytes: 1.0)
    engines.all[0].updates.append(failure)
    sync.sync(1, verify=False)
    assert actors.stops == 1
    assert engines.all[1].version == 1
    if failure is LOST:
        assert engines.all[0].calls == ["take_drafts", "pause", "join_groups", "update_weights"]
    sync.sync(2, verify=False)
    assert actors.stops == 1


def test_an_engine_whose_weights_cannot_be_compared_serves_and_the_user_is_told(
    opened: Open, messages: list[str]
) -> None:
    sync, engines = opened(2)
    engines.all[1].checks.append(0)
    sync.sync(4, verify=True)
    assert versions(engines) == [4, 4]
    (message,) = messages
    assert "engine 1 could not compare weight version 4" in message and "log says why" in message


def test_all_engines_may_die_in_an_update(opened: Open) -> None:
    """They are replaced at the next call to the engines."""
    sync, engines = opened(2)
    for engine in engines.all:
        engine.updates.append(LOST)
    sync.sync(1, verify=True)
    assert engines.running == []


def test_a_replacement_gets_the_newest_weights(opened: Open, messages: list[str]) -> None:
    """It gets them at the first attempt, since all engines form new groups before anything is sent."""
    sync, engines = opened(2)
    sync.sync(1, verify=True)
    sync.sync(2, verify=False)
    replaced = engines.all[1]
    replaced.state, replaced.version, replaced.groups, replaced.launches = "awaiting_weights", None, [], 2
    engines.refresh()
    assert engines.all[1].state == "serving"
    assert versions(engines) == [2, 2]
    assert messages == []


def test_an_update_describes_what_will_arrive(opened: Open) -> None:
    sync, engines = opened(1)
    seen: list[Any] = []
    answer = engines.all[0].answer
    engines.all[0].answer = lambda method, *arguments: (seen.append((method, arguments)), answer(method, *arguments))[1]
    sync.sync(1, verify=True)
    (update,) = next(arguments for method, arguments in seen if method == "update_weights")
    assert update.version == 1 and update.take_checksums
    if isinstance(update, CollectiveUpdate):
        assert [stage.group for stage in update.stages] == [member.name for member in engines.all[0].groups]
    else:
        assert [part.name for part in update.parts] == ["stage-0", "stage-1"]
