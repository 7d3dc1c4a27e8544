"""A run's checkpoint found and linked as a model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron_rl.checkpoint.as_model import find_checkpoint, link_as_model
from megatron_rl.checkpoint.manifest import FORMAT, DriverState, Manifest, Origin, write_manifest
from megatron_rl.checkpoint.shards import write_shard
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import open_weights

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with one checkpoint, whose weights are in two files."""
    checkpoint = tmp_path / "run/checkpoints/step_000003"
    checkpoint.mkdir(parents=True)
    files = {f"{name}.safetensors": {name: tensor} for name, tensor in TENSORS.items()}
    entries = {file: write_shard(checkpoint / file, "weights", tensors) for file, tensors in files.items()}
    entries["m.safetensors"] = write_shard(checkpoint / "m.safetensors", "exp_avg", TENSORS)
    write_manifest(checkpoint, Manifest(FORMAT, DriverState(3, 3, {}), {}, Origin({}, {}, "", {}), 3, entries))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"model": {"path": str(tmp_path / "model")}}))
    return tmp_path / "run"


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step_000003"])
def test_a_checkpoint_is_found_from_its_parent_folders(run: Path, place: str) -> None:
    found = find_checkpoint(run / place)
    assert found is not None and found.resolve() == run / "checkpoints/step_000003"


def test_a_model_folder_is_not_a_checkpoint(run: Path) -> None:
    assert find_checkpoint(run.parent / "model") is None


def test_a_linked_checkpoint_reads_as_the_model(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    link_as_model(run / "checkpoints/step_000003", folder)
    found = open_weights(folder)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert (folder / "config.json").read_text() == "{}"


def test_the_error_for_a_missing_model_asks_for_its_folder(run: Path, tmp_path: Path) -> None:
    checkpoint, config = run / "checkpoints/step_000003", run / "config.yaml"
    (tmp_path / "model/config.json").unlink()
    for change, message in (
        (lambda: None, "was trained from .*model, which does not exist on this machine"),
        (lambda: config.write_text("model: 3"), "does not say which model was trained"),
        (config.unlink, "is no longer in its run's folder"),
    ):
        change()
        with pytest.raises(UserError, match=rf"{message}.*--base FOLDER"):
            link_as_model(checkpoint, tmp_path / "linked")
    assert not (tmp_path / "linked").exists()
