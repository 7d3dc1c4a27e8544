"""Recorded rollouts train the same way again without an engine, and a run can sample rollouts without training."""

from __future__ import annotations

import pytest

from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine, Finished, values
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

SHORT = (*SHORT_WARM_START, "evaluation.suites={}", "evaluation.probes={}", "actor.tensor_parallel=1", "train.steps=2")


@pytest.fixture(scope="module")
def recorded(command_line: CommandLine) -> Finished:
    finished = command_line.train("recorded", *SHORT, "observability.rollouts_every=1", "rollout.engines=1")
    assert finished.status == 0, finished.output[-3000:]
    return finished


def test_a_replay_repeats_the_updates(recorded: Finished, command_line: CommandLine) -> None:
    again = command_line.train("again", "--rollouts", str(recorded.folder), *SHORT)
    assert again.status == 0, again.output[-3000:]
    for metric in ("train/loss", "train/grad_norm", "reward/mean", "entropy/token_mean", "lpreg/delta"):
        assert values(again, metric) == values(recorded, metric) and len(values(again, metric)) == 2, metric
    assert not (again.folder / "checkpoints").exists() and not (again.folder / "hf").exists()
    assert not list((again.folder / "logs").glob("engine*"))


def test_rollout_only_samples_without_training(recorded: Finished, command_line: CommandLine) -> None:
    alone = command_line.train("alone", "--rollout-only", *SHORT, "rollout.engines=1")
    assert alone.status == 0, alone.output[-3000:]
    assert len(list((alone.folder / "rollouts").iterdir())) == 2
    assert values(alone, "reward/mean")[0] == values(recorded, "reward/mean")[0]
    assert values(alone, "train/loss") == []
    assert not (alone.folder / "checkpoints").exists()


def test_a_folder_without_dumps_is_refused(command_line: CommandLine) -> None:
    empty = command_line.folder / "empty"
    empty.mkdir()
    process = command_line.start("train", str(QUICKSTART), "--rollouts", str(empty))
    finished = command_line.finish(process, "nothing")
    assert finished.status == 2 and "holds no rollout dumps" in finished.output
