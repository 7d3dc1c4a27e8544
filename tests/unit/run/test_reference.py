"""A resumed run uses the reference model that it was started with, even if its folder has moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.checkpoint.manifest import ModelFolder
from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.run.reference import find_reference

TEXT = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
train: {steps: 10}
run: {name: mine}
"""


def config(tmp_path: Path, **reference_kl: object) -> Config:
    (tmp_path / "example.yaml").write_text(TEXT)
    return load_config(tmp_path / "example.yaml", [f"algorithm.reference_kl.{k}={v}" for k, v in reference_kl.items()])


def model(folder: Path, value: float) -> Path:
    folder.mkdir()
    save_file({"weight": torch.full((3,), value)}, folder / "model.safetensors")
    return folder


def not_asked() -> Path:
    raise AssertionError("the policy's initial weights must not be used")


@pytest.fixture
def recorded(tmp_path: Path) -> ModelFolder:
    """The recorded reference of a run that uses the policy's initial weights."""
    found = find_reference(config(tmp_path, coefficient=0.1), None, lambda: model(tmp_path / "start", 1.0))
    assert found is not None and found.path == str(tmp_path / "start")
    return found


def test_a_loss_without_the_penalty_has_no_reference(tmp_path: Path) -> None:
    assert find_reference(config(tmp_path), None, not_asked) is None


def test_a_resumed_run_reads_the_recorded_folder(tmp_path: Path, recorded: ModelFolder) -> None:
    assert find_reference(config(tmp_path, coefficient=0.1), recorded, not_asked) == recorded


def test_a_changed_reference_is_refused(tmp_path: Path, recorded: ModelFolder) -> None:
    shutil.rmtree(recorded.path)
    model(Path(recorded.path), 2.0)
    with pytest.raises(UserError, match=r"reference model in .*start is not the one .*reference_kl\.model=FOLDER"):
        find_reference(config(tmp_path, coefficient=0.1), recorded, not_asked)
    other = model(tmp_path / "other", 3.0)
    with pytest.raises(UserError, match="other is not the one"):
        find_reference(config(tmp_path, coefficient=0.1, model=other), recorded, not_asked)


def test_a_moved_reference_can_be_named(tmp_path: Path, recorded: ModelFolder) -> None:
    moved = Path(recorded.path).rename(tmp_path / "moved")
    found = find_reference(config(tmp_path, coefficient=0.1, model=moved), recorded, not_asked)
    assert found == ModelFolder(str(moved), recorded.sha256)


def test_a_missing_reference_is_written_again_and_compared(tmp_path: Path, recorded: ModelFolder) -> None:
    shutil.rmtree(recorded.path)
    again = find_reference(config(tmp_path, coefficient=0.1), recorded, lambda: model(tmp_path / "again", 1.0))
    assert again == ModelFolder(str(tmp_path / "again"), recorded.sha256)
    shutil.rmtree(again.path)
    with pytest.raises(UserError, match="is not the one"):
        find_reference(config(tmp_path, coefficient=0.1), recorded, lambda: model(tmp_path / "another", 2.0))
