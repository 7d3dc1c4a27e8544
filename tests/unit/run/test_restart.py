"""When a run that has lost ranks is opened again, and from where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.cluster.actors import RanksLost
from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.run.interrupt import Stop
from megatron_rl.run.restart import Attempts

QUICKSTART = Path(__file__).parents[3] / "examples/quickstart/countdown.yaml"
STEP_3, STEP_6 = Path("step_000003"), Path("step_000006")


def attempts(tmp_path: Path, *overrides: str) -> Attempts:
    return Attempts(load_config(QUICKSTART, [f"run.folder={tmp_path / 'run'}", *overrides]))


def lose(tried: Attempts, newest: Path | None, *, stop: bool = False, keeps_weights: bool = True) -> None:
    """One attempt that writes a checkpoint and then loses a rank."""
    run: Any = SimpleNamespace(saver=SimpleNamespace(newest=newest), keeps_weights=keeps_weights)
    with tried:
        tried.opened(run, Stop(stop))
        raise RanksLost("the process of actor rank 1 has ended.")


def test_a_run_is_opened_again_from_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = attempts(tmp_path)
    lose(tried, None)
    assert not tried.ended and tried.config.resume == "auto"
    assert "RESTART 1 of 3 since the last checkpoint: the process of actor rank 1 has ended." in capsys.readouterr().out
    with tried:
        pass
    assert tried.ended


def test_the_limit_counts_restarts_without_a_new_checkpoint(tmp_path: Path) -> None:
    tried = attempts(tmp_path, "cluster.restarts=2")
    for newest in (STEP_3, STEP_3, STEP_6, None):
        lose(tried, newest)
    with pytest.raises(UserError, match=r"(?s)actor rank 1 has ended.*resume=auto.*2 of 2 times.*cluster.restarts"):
        lose(tried, None)
    assert tried.ended


def test_a_resumed_run_without_a_checkpoint_of_its_own_begins_where_it_began(tmp_path: Path) -> None:
    tried = attempts(tmp_path, f"resume={tmp_path / 'other'}")
    lose(tried, None)
    assert tried.config.resume == tmp_path / "other"
    lose(tried, STEP_3)
    assert tried.config.resume == "auto"


@pytest.mark.parametrize("reason", [{"stop": True}, {"keeps_weights": False}])
def test_a_run_ends_that_was_asked_to_stop_or_has_no_checkpoints(tmp_path: Path, reason: dict[str, bool]) -> None:
    with pytest.raises(UserError, match="resume=auto"):
        lose(attempts(tmp_path), None, **reason)


def test_a_run_that_cannot_be_opened_again_says_why_and_may_be_queued_again(tmp_path: Path) -> None:
    tried = attempts(tmp_path)
    lose(tried, STEP_3)
    with pytest.raises(RanksLost, match=r"(?s)rank 1 has ended.*could not be opened again: Ray lacks") as raised, tried:
        raise UserError("Ray lacks the nodes for this run")
    assert raised.value.status != UserError.status


def test_other_errors_end_the_run(tmp_path: Path) -> None:
    tried = attempts(tmp_path)
    with pytest.raises(UserError, match="another"), tried:
        raise UserError("another")
    assert tried.ended
