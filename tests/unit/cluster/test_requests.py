"""A request that is cancelled ends in its engine, and no other does; requests go on while the actor works."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.cluster import actors
from megatron_rl.cluster.engines import Engines, EnginesLost
from megatron_rl.cluster.runtime import ray_runtime
from megatron_rl.config import load_config
from megatron_rl.parallel.placement import placement_of
from megatron_rl.rollout.engines.interface import EngineLaunch, RolloutEngine, response_of
from megatron_rl.rollout.engines.kind import EngineKind
from megatron_rl.types import Prompt, SamplingParams
from tests.patience import Patience
from tests.tiers import slow
from tests.unit.config.conftest import MINIMAL

KIND = EngineKind(name="waiting", engine=f"{__name__}:WaitingEngine", embedded=False)
CONFIG = MINIMAL + "actor: {device: cpu}\n"


class WaitingEngine(RolloutEngine):
    """It answers the prompt 1 at once and any other prompt when a file `go` appears. It notes which calls end how."""

    def __init__(self, launch: EngineLaunch) -> None:
        self.folder = launch.model_folder

    async def start(self) -> None:  # type: ignore[override]
        pass

    async def resume(self) -> None:  # type: ignore[override]
        pass

    async def close(self) -> None:  # type: ignore[override]
        pass

    async def generate(self, prompts: Any, sampling: Any, partial: Any = (), min_groups: Any = None) -> Any:  # type: ignore[override]
        import asyncio

        (number,) = prompts[0]
        (self.folder / f"begun {number}").touch()
        try:
            while number != 1 and not (self.folder / "go").exists():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            (self.folder / f"cancelled {number}").touch()
            raise
        return [[response_of([number], [0.0], "stop", 0)]]

    def update_weights(self, update: Any) -> None:
        raise NotImplementedError

    def verify_weights(self, version: int, sent: Any) -> int:
        raise NotImplementedError

    def release_memory(self) -> None:
        raise NotImplementedError

    def health(self) -> int:
        raise NotImplementedError


@slow
def test_a_look_at_requests_while_the_actor_works_sends_no_weights_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor's weights may be between two updates, and a step in progress cannot be saved."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    (tmp_path / "mine.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "mine.yaml", [f"rollout.engine={__name__}:KIND", "data.max_prompt_tokens=8"])
    sent: list[int] = []
    with ray_runtime(placement_of(config)) as nodes:
        launch = EngineLaunch(KIND, tmp_path, "cpu", "float32", 16)
        engines = Engines(config.rollout, launch, tmp_path / "logs", nodes)
        (number,) = engines.submit([Prompt("", (1,), "", None)], SamplingParams(1, 1, 1.0, (), 0))
        patience = Patience(lambda: [os.getpid()], "a look at requests")
        while not engines.wait([number], seconds=0.05):
            patience.check()
        (engine,) = engines._engines
        engine.state, engines.refresh = "awaiting_weights", lambda: sent.append(1)
        engines._outage_seconds, engines._served_at = 0.0, 0.0
        assert engines.wait([number + 1], seconds=0) == set() and not sent
        with pytest.raises(EnginesLost):
            engines.wait([number + 1], seconds=0.05)
        assert sent == [1]
        engines.close()


def test_a_wait_for_the_actor_does_something_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [[], [], ["ended"]]
    monkeypatch.setattr(actors, "ray", SimpleNamespace(wait=lambda refs, timeout: (left.pop(0), [])))
    monkeypatch.setattr(actors, "results", lambda refs: ["found"])
    own, calls = object.__new__(actors.Actors), list[int]()
    own.meanwhile = lambda: calls.append(1)
    assert own._awaited(["ref"]) == ["found"] and calls == [1, 1]  # type: ignore[list-item]


@slow
def test_a_cancelled_request_ends_in_its_engine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    (tmp_path / "mine.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "mine.yaml", [f"rollout.engine={__name__}:KIND", "data.max_prompt_tokens=8"])
    launch = EngineLaunch(KIND, tmp_path, "cpu", "float32", 16)
    prompts = [Prompt("", (number,), "", None) for number in (1, 2, 3, 4)]

    def seen() -> set[str]:
        return {path.name for path in tmp_path.glob("* [0-9]")}

    def until(*names: str) -> None:
        patience = Patience(lambda: [os.getpid()], f"a test without {names}")
        while not seen().issuperset(names):
            patience.check()
            engines.wait([first], seconds=0.05)

    with ray_runtime(placement_of(config)) as nodes:
        engines = Engines(config.rollout, launch, tmp_path / "logs", nodes)
        first, *others = engines.submit(prompts, SamplingParams(1, 1, 1.0, (), 0))
        until(*(f"begun {number}" for number in (1, 2, 3, 4)))
        engines.cancel([first, others[0], others[1]])
        until("cancelled 2", "cancelled 3")
        (tmp_path / "go").touch()
        assert engines.wait([others[2]]) == {others[2]}
        assert engines.take(others[2])[0].token_ids.tolist() == [4]
        time.sleep(0.2)
        assert not engines.wait([first, *others], seconds=0.05), "a cancelled request has an answer"
        engines.close()
    assert {name for name in seen() if name.startswith("cancelled")} == {"cancelled 2", "cancelled 3"}
