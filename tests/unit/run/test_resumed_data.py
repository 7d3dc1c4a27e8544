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
from megatron_rl.run.folder import Resumption
from megatron_rl.run.resume import data_file, same_data
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
