"""Invalid distributed checkpoints. tests/invariance has Megatron itself read and write valid ones."""

from __future__ import annotations

import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rl.conversion.torch_dist import (
    CONFIG,
    INDEX,
    RELEASE,
    TRACKER,
    TorchDistWeights,
    resolve,
    write_torch_dist,
)
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry, entries
from megatron_rl.models.fused_experts import as_stored
from megatron_rl.models.fusion import split
from tests.hf_models import config_json, hf_model


@pytest.fixture(params=["qwen3", "qwen3_moe"])
def tensors(request: pytest.FixtureRequest) -> tuple[Architecture, dict[str, Tensor]]:
    model = hf_model(request.param, noise=0.1)
    weights = as_stored({name: parameter.detach() for name, parameter in model.named_parameters()})
    return Architecture.from_hf(config_json(request.param)), weights


def write(folder: Path, architecture: Architecture, weights: dict[str, Tensor]) -> Path:
    def megatron(entry: Entry) -> Tensor:
        return split(entry.rule.kind, [weights[name] for name in entry.hf_names], architecture, 1, 0)

    write_torch_dist(folder, architecture, lambda _: torch.float32, megatron)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Architecture]:
    model = hf_model()
    architecture = Architecture.from_hf(config_json())
    return write(tmp_path / "checkpoint", architecture, dict(model.named_parameters())), architecture


def test_a_written_checkpoint_is_read_back(tmp_path: Path, tensors: tuple[Architecture, dict[str, Tensor]]) -> None:
    architecture, weights = tensors
    read = TorchDistWeights(write(tmp_path / "checkpoint", architecture, weights), architecture)
    names = set()
    for entry in entries(architecture):
        assert read.dtype(entry) == torch.float32
        for name, tensor in zip(entry.hf_names, read.read(entry), strict=True):
            assert torch.equal(tensor, weights[name]), name
            names.add(name)
    assert names == set(weights)


def test_the_newest_checkpoint_of_a_save_folder_is_read(checkpoint: tuple[Path, Architecture]) -> None:
    folder, _ = checkpoint
    assert resolve(folder) == folder / RELEASE
    (folder / TRACKER).write_text("120\n")
    assert resolve(folder) == folder / "iter_0000120"
    assert resolve(folder / RELEASE) == folder / RELEASE
    (folder / TRACKER).write_text("soon")
    with pytest.raises(UserError, match="names no checkpoint: 'soon'"):
        resolve(folder)


def test_another_model_is_refused(checkpoint: tuple[Path, Architecture]) -> None:
    folder, _ = checkpoint
    other = Architecture.from_hf(config_json("qwen2", num_hidden_layers=3, intermediate_size=64))
    with pytest.raises(UserError, match="does not hold the model") as refusal:
        TorchDistWeights(folder, other)
    lines = str(refusal.value).splitlines()
    assert any("missing: decoder.layers.0.self_attention.linear_qkv.bias" in line for line in lines)
    assert any("linear_fc1.weight: shape (96, 32), expected (128, 32)" in line for line in lines)


def test_another_format_is_refused(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    (folder / RELEASE / CONFIG).write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UserError, match="is a zarr checkpoint"):
        TorchDistWeights(folder, architecture)
    (folder / RELEASE / CONFIG).unlink()
    with pytest.raises(UserError, match=f"{CONFIG} cannot be read"):
        TorchDistWeights(folder, architecture)


def test_a_truncated_file_is_named_in_the_error(checkpoint: tuple[Path, Architecture]) -> None:
    folder, architecture = checkpoint
    (file,) = (folder / RELEASE).glob("*.distcp")
    file.write_bytes(file.read_bytes()[:2000])
    weights = TorchDistWeights(folder, architecture)
    with pytest.raises(UserError, match=r"release is damaged: .* cannot be read"):
        for entry in entries(architecture):
            weights.read(entry)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("code_was_run"),))


def test_an_index_with_code_is_refused_without_running_it(
    checkpoint: tuple[Path, Architecture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, architecture = checkpoint
    monkeypatch.chdir(tmp_path)
    index = folder / RELEASE / INDEX
    harmless = pickle.loads(index.read_bytes())
    assert isinstance(harmless, Metadata)
    for poison in (RunsCode(), print, torch.load, subprocess.Popen, dcp.FileSystemWriter):
        index.write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, planner_data=poison)))
        with pytest.raises(UserError, match="is not the index of a distributed checkpoint"):
            TorchDistWeights(folder, architecture)
    assert not Path("code_was_run").exists()
    index.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not the index"):
        TorchDistWeights(folder, architecture)
    with index.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="larger than 256 MiB"):
        TorchDistWeights(folder, architecture)
    index.unlink()
    with pytest.raises(UserError, match="is missing"):
        TorchDistWeights(folder, architecture)
