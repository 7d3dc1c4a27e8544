"""Resuming with the training file of the checkpoint, with another one, and from checkpoints that name none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.checkpoint.manifest import MANIFEST, read_manifest
from megatron_rl.errors import UserError
from megatron_rl.observability.metrics import MetricsLog
from megatron_rl.run.folder import Resumption
from megatron_rl.run.resume import changed_metrics, data_file, same_data
from tests.unit.checkpoint.conftest import Saving


def config_of(path: Path, *, allowed: bool = False) -> Any:
    return SimpleNamespace(data=SimpleNamespace(train=path, allow_changed=allowed))


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "1", "label": "1"}\n')
    return path


@pytest.fixture
def checkpoint(train: Path, tmp_path: Path) -> Path:
    """A checkpoint of a run on this file."""
    saving = Saving(tmp_path / "checkpoints")
    saving.origin = replace(saving.origin, data=data_file(config_of(train)))
    return saving.save(3)


def resumes(path: Path, checkpoint: Path, *, allowed: bool = False) -> bool:
    config = config_of(path, allowed=allowed)
    return same_data(config, data_file(config), Resumption(checkpoint, read_manifest(checkpoint)))


@pytest.mark.parametrize("allowed", [False, True])
def test_the_same_file_continues_wherever_it_lies(train: Path, checkpoint: Path, tmp_path: Path, allowed: bool) -> None:
    assert resumes(train, checkpoint, allowed=allowed)
    moved = train.rename(tmp_path / "moved.jsonl")
    assert resumes(moved, checkpoint, allowed=allowed)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "2", "label": "1"}\n',  # as many rows
        '{"prompt": "1", "label": "1"}\n{"prompt": "2", "label": "1"}\n',
        '{"prompt": "1", "label": "1"}',
    ],
)
def test_another_file_is_an_error_unless_allowed(train: Path, checkpoint: Path, text: str) -> None:
    train.write_text(text)
    words = r"data\.train: .*train\.jsonl is not the file that .*step_000003 was trained on .*data\.allow_changed=true"
    with pytest.raises(UserError, match=words):
        resumes(train, checkpoint)
    assert not resumes(train, checkpoint, allowed=True), "neither the position nor the rollout buffer applies"


@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_checkpoint_of_an_earlier_version_resumes(train: Path, checkpoint: Path, how: str) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert set(manifest["origin"]["data"]) == {"path", "sha256"}
    if how == "absent":
        del manifest["origin"]["data"]
    else:
        manifest["origin"]["data"] = None
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    train.write_text("anything")
    assert resumes(train, checkpoint) and resumes(train, checkpoint, allowed=True)


def test_metrics_that_have_changed_before_the_checkpoint_are_announced(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, keep_up_to_step=None)
    log.write(2, {"reward/mean": 0.5})
    path = Saving(tmp_path / "checkpoints").save(3)
    older = read_manifest(path)
    manifest = replace(older, state=replace(older.state, metrics_log=log.written), metrics={"reward/mean": 0.75})
    log.write(3, manifest.metrics)
    log.write(4, {"reward/mean": 1.0})
    assert changed_metrics(tmp_path, Resumption(path, manifest)) == []

    metrics = tmp_path / "metrics.jsonl"
    content = metrics.read_text()
    for now in (content.replace("0.5", "0.4"), content.replace("0.75", "0.85"), content.splitlines()[1], ""):
        metrics.write_text(now)
        assert changed_metrics(tmp_path, Resumption(path, manifest)), now
        assert not changed_metrics(tmp_path / "another", Resumption(path, manifest)), "a checkpoint of another run"
        assert not changed_metrics(tmp_path, Resumption(path, older)), "an older checkpoint does not know"
    metrics.write_text(content.replace("1.0", "1.5"))
    assert not changed_metrics(tmp_path, Resumption(path, manifest)), "the line is not kept"
