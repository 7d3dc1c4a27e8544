"""Weight updates of a running embedded engine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.models.fused_experts import as_stored
from megatron_rl.models.hf_format import open_weights
from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.types import SamplingParams
from megatron_rl.weight_sync.checksums import Checksums, ChecksumTaker, WeightsDamaged
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import FolderUpdate

SAMPLING = SamplingParams(n=3, max_tokens=6, temperature=1.0, stop_token_ids=(), seed=0)
PROMPTS = [(1, 2), (3, 4, 5)]


def weights(engine: TransformersEngine) -> dict[str, Tensor]:
    """The weights as an actor publishes them: without a tied head."""
    tied = set(engine.model.all_tied_weights_keys)
    return {name: tensor for name, tensor in as_stored(engine.model.state_dict()).items() if name not in tied}


def publish(folder: Path, tensors: dict[str, Tensor], version: int = 7) -> tuple[FolderUpdate, Checksums]:
    """Writes an update in two parts, as two pipeline stages do."""
    names = sorted(tensors)
    stages = []
    for stage, own in enumerate((names[::2], names[1::2])):
        transport = FolderTransport(folder, stage, bucket_bytes=1000)
        stages.append(transport.push(((name, tensors[name]) for name in own), version, ChecksumTaker(1)))
    update = FolderUpdate(version, tuple(part for stage in stages for part in stage.parts))
    return update, Checksums.merge(stage.checksums for stage in stages if stage.checksums)


def test_the_next_token_comes_from_the_new_weights(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine, other = (TransformersEngine(folder, "cpu", "float32") for folder in model_folders)
    before = engine.generate(PROMPTS, SAMPLING)
    expected = other.generate(PROMPTS, SAMPLING)
    assert before != expected
    places = {name: tensor.data_ptr() for name, tensor in engine.model.state_dict().items()}

    update, checksums = publish(tmp_path, weights(other))
    engine.update_weights(update)
    assert engine.verify_weights(7, checksums) == len(weights(other))

    after = engine.generate(PROMPTS, SAMPLING)
    for group, expected_group in zip(after, expected, strict=True):
        for response, wanted in zip(group, expected_group, strict=True):
            assert response == replace(wanted, weight_version=7)
    assert engine.health() == 7
    assert places == {name: tensor.data_ptr() for name, tensor in engine.model.state_dict().items()}, "not in place"


def test_released_memory_is_restored_for_the_next_weights(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine, other = (TransformersEngine(folder, "cpu", "float32") for folder in model_folders)
    engine.release_memory()
    with pytest.raises(RuntimeError, match="paused"):
        engine.generate(PROMPTS, SAMPLING)
    update, checksums = publish(tmp_path, weights(other))
    engine.update_weights(update)
    assert engine.verify_weights(7, checksums) == len(weights(other))
    engine.resume()
    tokens = [[g.token_ids.tolist() for g in group] for group in engine.generate(PROMPTS, SAMPLING)]
    assert tokens == [[g.token_ids.tolist() for g in group] for group in other.generate(PROMPTS, SAMPLING)]


def test_tensor_names_are_those_of_the_folder(model_folders: tuple[Path, Path]) -> None:
    stored, engine = open_weights(model_folders[0]), TransformersEngine(model_folders[0], "cpu", "float32")
    assert stored.keys() == weights(engine).keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in weights(engine).items())


def test_an_update_that_leaves_out_a_tensor_is_refused(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine = TransformersEngine(model_folders[0], "cpu", "float32")
    tensors = weights(engine)
    left_out = [name for name in tensors if name.endswith("up_proj.weight")][-1]
    del tensors[left_out]
    with pytest.raises(KeyError, match=f"update 7 leaves out .*{re.escape(left_out)}"):
        engine.update_weights(publish(tmp_path, tensors)[0])
    assert engine.health() == 0


def test_an_update_with_an_unknown_tensor_is_refused(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine = TransformersEngine(model_folders[0], "cpu", "float32")
    tensors = weights(engine) | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}
    with pytest.raises(KeyError, match=r"update 7 has model\.layers\.2\.mlp\.up_proj\.weight"):
        engine.update_weights(publish(tmp_path, tensors)[0])


def test_an_update_with_a_tensor_of_another_shape_is_refused(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the check, one row would be broadcast to all rows."""
    engine = TransformersEngine(model_folders[0], "cpu", "float32")
    name = "model.embed_tokens.weight"
    tensors = weights(engine) | {name: torch.zeros(1, 32)}
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight as \[1, 32\].*\[50, 32\]"):
        engine.update_weights(publish(tmp_path, tensors)[0])


def test_a_damaged_part_is_detected(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine = TransformersEngine(model_folders[0], "cpu", "float32")
    update, checksums = publish(tmp_path, weights(engine))
    data = bytearray(update.parts[0].read_bytes())
    data[-1] ^= 1
    update.parts[0].write_bytes(data)
    engine.update_weights(update)
    with pytest.raises(WeightsDamaged, match=r"version 7 arrived damaged: 1 of \d+ tensors"):
        engine.verify_weights(7, checksums)


def test_bf16_weights_arrive_bit_for_bit(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    engine, other = (TransformersEngine(folder, "cpu", "bfloat16") for folder in model_folders)
    engine.update_weights(publish(tmp_path, weights(other))[0])
    for name, tensor in other.model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(engine.model.state_dict()[name], tensor), name
