"""A run left without engines leaves a checkpoint of its last whole step, whatever it was doing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.checkpoint.manifest import DriverState
from megatron_rl.cluster.engines import EnginesLost
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import RolloutBuffer
from megatron_rl.run.outage import checkpoint_on_outage
from megatron_rl.run.run import Run


class Saver:
    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, []
        self.under_way: int | None = None

    def wait(self) -> None:
        if self.under_way is not None:
            place = self.folder / f"step_{self.under_way:06d}"
            place.mkdir(parents=True)
            (place / "manifest.json").touch()

    def save(self, state: DriverState, metrics: dict[str, float], *, background: bool) -> None:
        self.saved.append((state, metrics, background))


def run_at(folder: Path, step: int, *, keeps_weights: bool = True) -> Any:
    cursor = SimpleNamespace(position=8 * step, state=lambda: {"position": cursor.position})
    run = SimpleNamespace(
        step=step,
        weight_version=2 * step,
        cursor=cursor,
        buffer=RolloutBuffer(),
        last_step=None,
        folder=folder,
        saver=Saver(folder / "checkpoints"),
        keeps_weights=keeps_weights,
    )
    run._state = lambda: Run._state(run)  # type: ignore[arg-type]
    run.step_done = lambda metrics: Run.step_done(run, metrics)  # type: ignore[arg-type]
    return run


def lose_engines_in_a_rollout(run: Any) -> None:
    """After it has drawn prompts."""
    with checkpoint_on_outage(run):
        run.cursor.position += 8
        raise EnginesLost("no engine for 5 s")


def test_the_step_under_way_is_not_in_it(tmp_path: Path) -> None:
    run = run_at(tmp_path, 3)
    run.cursor.position += 8
    run.step_done({"loss": 1.0})
    with pytest.raises(UserError, match=r"no engine for 5 s. To go on after step 4: .* resume=auto"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == [(DriverState(4, 6, {"position": 32}), {"loss": 1.0}, False)]


def test_one_that_is_being_written_is_not_written_again(tmp_path: Path) -> None:
    run = run_at(tmp_path, 3)
    run.step_done({})
    run.saver.under_way = 4
    with pytest.raises(UserError, match="after step 4"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == []


def test_a_run_that_has_just_been_resumed(tmp_path: Path) -> None:
    run = run_at(tmp_path, 3)
    with pytest.raises(UserError, match="after step 3"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == []


@pytest.mark.parametrize(("step", "keeps_weights"), [(0, True), (5, False)])
def test_where_there_is_nothing_to_keep(tmp_path: Path, step: int, keeps_weights: bool) -> None:
    run = run_at(tmp_path, step, keeps_weights=keeps_weights)
    if step:
        run.step_done({})
    with pytest.raises(UserError, match="no step yet to go on from"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == []


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too hard"), checkpoint_on_outage(run_at(tmp_path, 3)):
        raise UserError("too hard")
