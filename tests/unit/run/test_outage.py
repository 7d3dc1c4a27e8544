"""A run that loses its engines leaves a checkpoint of its last finished step, whatever it was doing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.checkpoint.manifest import DriverState
from megatron_rl.cluster.engines import EnginesLost
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group
from megatron_rl.run.outage import checkpoint_on_outage
from megatron_rl.run.run import Run
from megatron_rl.types import Prompt


class Saver:
    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, []
        self.groups: list[Group] = []
        self.under_way: int | None = None

    def wait(self) -> None:
        if self.under_way is not None:
            place = self.folder / f"step_{self.under_way:06d}"
            place.mkdir(parents=True)
            (place / "manifest.json").touch()

    def save(self, state: DriverState, metrics: dict[str, float], groups: list[Group], *, background: bool) -> None:
        self.saved.append((state, metrics, background))
        self.groups = groups


LEFT = Group(7, 7, Prompt("p:7", (1,), "", None), 0)
"""The step before leaves this group to the next."""


def run_at(folder: Path, step: int, *, keeps_weights: bool = True) -> Any:
    cursor = SimpleNamespace(position=8 * step, state=lambda: {"position": cursor.position})
    run = SimpleNamespace(
        step=step,
        learner=SimpleNamespace(weight_version=2 * step, entropy_coefficient=None),
        cursor=cursor,
        rollouts=SimpleNamespace(pending=[LEFT]),
        metrics=SimpleNamespace(written=None),
        last_step=None,
        folder=folder,
        saver=Saver(folder / "checkpoints"),
        keeps_weights=keeps_weights,
    )
    run._state = lambda: Run._state(run)  # type: ignore[arg-type]
    run.step_done = lambda metrics: Run.step_done(run, metrics)  # type: ignore[arg-type]
    return run


def lose_engines_in_a_rollout(run: Any) -> None:
    """Loses the engines after the step has drawn prompts."""
    with checkpoint_on_outage(run):
        run.cursor.position += 8
        raise EnginesLost("no engine for 5 s")


def test_the_checkpoint_leaves_out_the_step_in_progress(tmp_path: Path) -> None:
    run = run_at(tmp_path, 3)
    run.cursor.position += 8
    run.step_done({"loss": 1.0})
    with pytest.raises(UserError, match=r"no engine for 5 s. To continue after step 4: .* resume=auto"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == [(DriverState(4, 6, {"position": 32}), {"loss": 1.0}, False)]
    assert run.saver.groups == [LEFT]


def test_a_checkpoint_that_is_being_written_is_not_written_again(tmp_path: Path) -> None:
    run = run_at(tmp_path, 3)
    run.step_done({})
    run.saver.under_way = 4
    with pytest.raises(UserError, match="after step 4"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == []


def test_a_run_that_has_just_been_resumed_needs_no_checkpoint(tmp_path: Path) -> None:
    run = run_at(tmp_path, 3)
    with pytest.raises(UserError, match="after step 3"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == []


@pytest.mark.parametrize(("step", "keeps_weights"), [(0, True), (5, False)])
def test_a_run_without_anything_to_keep_saves_nothing(tmp_path: Path, step: int, keeps_weights: bool) -> None:
    run = run_at(tmp_path, step, keeps_weights=keeps_weights)
    if step:
        run.step_done({})
    with pytest.raises(UserError, match="no finished step yet to continue from"):
        lose_engines_in_a_rollout(run)
    assert run.saver.saved == []


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too hard"), checkpoint_on_outage(run_at(tmp_path, 3)):
        raise UserError("too hard")
