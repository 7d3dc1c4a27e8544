from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from megatron_rl.checkpoint.manifest import MANIFEST, checkpoints, step_of
from megatron_rl.checkpoint.retention import Retention, best
from megatron_rl.config.schema import KeepBestSettings
from tests.unit.checkpoint.conftest import Saving

METRIC = "eval/suite/avg@8"
VALUES = {1: 0.1, 2: 0.5, 3: None, 4: 0.5, 5: 0.3, 6: 0.2}


def save_all(saving: Saving, retention: Retention) -> list[int]:
    for step, value in VALUES.items():
        saving.save(step, retention, **({} if value is None else {METRIC: value}))
    return [step_of(path) for path in checkpoints(saving.folder)]


def keep_best(mode: Literal["max", "min"] = "max", count: int = 1) -> KeepBestSettings:
    return KeepBestSettings(metric=METRIC, mode=mode, count=count)


@pytest.mark.parametrize(("last", "left"), [(0, [1, 2, 3, 4, 5, 6]), (1, [6]), (2, [5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_the_newest_checkpoints_are_kept(saving: Saving, last: int, left: list[int]) -> None:
    assert save_all(saving, Retention(last)) == left
    assert (saving.folder / "latest").resolve() == saving.folder / "step_000006"
    assert not (saving.folder / "best").exists()


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (keep_best(), [2, 6]),  # the earlier of two equal ones
        (keep_best(count=2), [2, 4, 6]),
        (keep_best(count=3), [2, 4, 5, 6]),
        (keep_best("min"), [1, 6]),
    ],
)
def test_the_best_checkpoints_are_kept_too(saving: Saving, settings: KeepBestSettings, left: list[int]) -> None:
    assert save_all(saving, Retention(1, settings)) == left
    first = saving.folder / f"step_{left[0]:06d}"
    assert best(saving.folder, settings)[0] == first
    assert (saving.folder / "best").resolve() == first
    assert (saving.folder / "latest").resolve() == saving.folder / "step_000006"


def test_without_an_evaluation_there_is_no_best_link(saving: Saving) -> None:
    saving.save(1, Retention(1, keep_best()))
    assert not (saving.folder / "best").is_symlink()


def test_a_metric_that_is_not_measured_is_announced(saving: Saving) -> None:
    saving.save(1, Retention(1, keep_best()), **{"reward/mean": 1.0})
    assert len(saving.messages) == 1  # no message without an evaluation at this step
    saving.save(2, Retention(1, keep_best()), **{"eval/suite/avg@4": 1.0})
    assert f"{METRIC} was not measured" in saving.messages[1] and "eval/suite/avg@4" in saving.messages[1]


def test_a_damaged_checkpoint_is_never_the_best(saving: Saving) -> None:
    saving.save(1, Retention(0, keep_best()), **{METRIC: 0.9})
    saving.save(2, Retention(0, keep_best()), **{METRIC: 0.1})
    (saving.folder / "step_000001" / MANIFEST).write_text("{")
    saving.save(3, Retention(0, keep_best()), **{METRIC: 0.2})
    assert (saving.folder / "best").resolve() == saving.folder / "step_000003"


def test_a_file_system_without_links_is_announced_and_the_checkpoint_is_saved(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", fail)
    saving.save(1)
    assert [step_of(path) for path in checkpoints(saving.folder)] == [1]
    assert saving.messages[0] == f"cannot link {saving.folder / 'latest'} to step_000001: Operation not permitted"
