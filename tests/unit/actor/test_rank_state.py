"""A stage's training state, written and read back on one rank. tests/invariance compares layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.actor.model.policy import build_model
from megatron_rl.actor.optimizer.distributed import wrap_ddp
from megatron_rl.actor.optimizer.optimizer import Optimizer
from megatron_rl.actor.optimizer.state import read_state
from megatron_rl.actor.rank_state import RankState, export_stage
from megatron_rl.checkpoint import shards
from megatron_rl.checkpoint.manifest import (
    FORMAT,
    RNG,
    DriverState,
    Manifest,
    Origin,
    RandomStates,
    RankPart,
    ShardFile,
    read_checkpoint,
    write_manifest,
    write_rng,
)
from megatron_rl.config.actor import OptimizerSettings
from megatron_rl.errors import UserError
from megatron_rl.models.hf_shards import write_hf_shards
from megatron_rl.models.weight_map import export_hf_weights, publish_hf_weights
from megatron_rl.parallel.layout import Layout
from tests.hf_models import config_json
from tests.meeting import only_rank

CPU = torch.device("cpu")
CONFIG = config_json("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    with only_rank():
        yield


class Stage:
    """A model with its optimizer, trained with random gradients."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.model = build_model(CONFIG, layout=Layout(), dtype=dtype, device=CPU)
        self.random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.2, generator=self.random)
        self.ddp = wrap_ddp(self.model)
        self.optimizer = Optimizer([self.ddp], OptimizerSettings(lr=1e-2, weight_decay=0.1), dtype)

    def step(self) -> None:
        self.ddp.zero_grad_buffer()
        for parameter in self.model.parameters():
            parameter.main_grad.normal_(generator=self.random)
        self.optimizer.step(1e-2)

    def rank_state(self, snapshot: dict[str, torch.Tensor] | None = None) -> RankState:
        return RankState(self.model, CONFIG, self.optimizer, snapshot or {}, Layout(), rank=0)

    def everything(self) -> dict[str, torch.Tensor]:
        state, steps = read_state(self.optimizer, self.model)
        kinds = {"parameters": dict(self.model.named_parameters()), **state}
        values = {
            f"{kind} {name}": value.detach().clone() for kind, named in kinds.items() for name, value in named.items()
        }
        return values | {"steps": torch.tensor(steps)}


def save(folder: Path, stage: Stage, snapshot: dict[str, torch.Tensor] | None = None) -> Manifest:
    return complete(folder, stage.rank_state(snapshot).write(folder))


def complete(folder: Path, part: RankPart, layout: Layout | None = None) -> Manifest:
    """Add the files that the driver writes."""
    origin = Origin({}, asdict(layout or Layout()), "float32", {})
    files = part.files | {RNG: write_rng(folder, RandomStates({}, [part.rng]))}
    manifest = Manifest(FORMAT, DriverState(1, 1, {}), {}, origin, part.optimizer_steps, files)
    write_manifest(folder, manifest)
    return read_checkpoint(folder)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_stage_continues_like_the_saved_one(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, loaded = Stage(0, dtype), Stage(1, dtype)
    for _ in range(3):
        saved.step()
    snapshot = {name: parameter.detach() + 1 for name, parameter in saved.model.named_parameters()}
    manifest = save(tmp_path, saved, snapshot)
    assert {entry.kind for entry in manifest.files.values()} == {"weights", "exp_avg", "exp_avg_sq", "lagged", "rng"}
    drawn = torch.rand(3)

    lagged = loaded.rank_state().load(tmp_path)
    assert torch.equal(torch.rand(3), drawn)
    assert_same(saved.everything(), loaded.everything())
    assert_same(lagged, snapshot)

    loaded.random.set_state(saved.random.get_state())
    for stage in (saved, loaded):
        stage.step()
    assert_same(saved.everything(), loaded.everything())


def test_a_held_state_is_that_of_the_moment(tmp_path: Path) -> None:
    stage, loaded = Stage(0, torch.float32), Stage(1, torch.float32)
    stage.step()
    before, held = stage.everything(), stage.rank_state().held()
    stage.step()
    complete(tmp_path, held.write(tmp_path))
    loaded.rank_state().load(tmp_path)
    assert_same(loaded.everything(), before)


def test_a_stage_without_optimizer_steps_is_saved_too(tmp_path: Path) -> None:
    saved, loaded = Stage(0, torch.float32), Stage(1, torch.float32)
    manifest = save(tmp_path, saved)
    assert not any(entry.kind == "lagged" for entry in manifest.files.values())
    assert loaded.rank_state().load(tmp_path) == {}
    assert_same(saved.everything(), loaded.everything())


def test_random_states_of_another_layout_are_not_restored(tmp_path: Path) -> None:
    complete(tmp_path, Stage(0, torch.float32).rank_state().write(tmp_path), Layout(tensor=2))
    stage = Stage(1, torch.float32)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stage.rank_state().load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_files_are_bounded_and_a_rank_holds_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "FILE_BYTES", 4096)
    written: list[Path] = []
    real = shards.write_shard

    def record(path: Path, kind: str, tensors: dict[str, torch.Tensor]) -> ShardFile:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4096 or len(tensors) == 1
        assert all(path.is_file() for path in written)  # each file is written before the next is gathered
        written.append(path)
        return real(path, kind, tensors)

    monkeypatch.setattr(shards, "write_shard", record)
    saved, loaded = Stage(0, torch.float32), Stage(1, torch.float32)
    saved.step()
    save(tmp_path, saved)
    assert len(written) > 10
    loaded.rank_state().load(tmp_path)
    assert_same(saved.everything(), loaded.everything())


def test_after_a_full_disk_a_rank_takes_part_in_all_gathers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks need it, because the gathers are collective."""
    drawn: list[str] = []

    def export(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in export_hf_weights(*arguments):
            drawn.append(name)
            yield name, tensor

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "FILE_BYTES", 4096)
    monkeypatch.setattr("megatron_rl.actor.rank_state.export_hf_weights", export)
    monkeypatch.setattr(shards, "write_shard", fail)
    stage = Stage(0, torch.float32)
    with pytest.raises(OSError, match="No space"):
        stage.rank_state().write(tmp_path)
    assert len(drawn) == 3 * len(list(export_hf_weights(stage.model, CONFIG)))


def test_a_stage_is_exported_in_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(0, torch.bfloat16)
    monkeypatch.setattr("megatron_rl.actor.rank_state.write_hf_shards", partial(write_hf_shards, max_bytes=9000))
    written = export_stage(tmp_path, stage.model, CONFIG, 3, publishes=True)
    assert written is not None and len(written) > 2
    assert [shard.file for shard in written] == sorted(path.name for path in tmp_path.iterdir())
    assert {dtype for shard in written for dtype in shard.dtypes} == {"bfloat16"}
    found: dict[str, torch.Tensor] = {}
    for shard in written:
        tensors = load_file(tmp_path / shard.file)
        assert set(shard.tensors) == set(tensors)
        assert shard.bytes == sum(tensor.nbytes for tensor in tensors.values()) <= 9000
        found |= tensors
    assert_same(found, dict(export_hf_weights(stage.model, CONFIG)))


def test_only_the_publishing_rank_exports(tmp_path: Path) -> None:
    assert export_stage(tmp_path, Stage(0, torch.float32).model, CONFIG, 0, publishes=False) is None
    assert list(tmp_path.iterdir()) == []


def test_after_a_full_disk_a_rank_takes_part_in_the_rest_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def export(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in publish_hf_weights(*arguments):
            drawn.append(name)
            yield name, tensor

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_rl.actor.rank_state.publish_hf_weights", export)
    monkeypatch.setattr("megatron_rl.actor.rank_state.write_hf_shards", fail)
    stage = Stage(0, torch.float32)
    with pytest.raises(OSError, match="No space"):
        export_stage(tmp_path, stage.model, CONFIG, 0, publishes=True)
    assert len(drawn) == len(list(export_hf_weights(stage.model, CONFIG)))


def test_a_file_damaged_after_verification_is_named_in_the_error(tmp_path: Path) -> None:
    stage = Stage(0, torch.float32)
    save(tmp_path, stage)
    path = tmp_path / "exp_avg-rank-0-part-0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{path} is damaged .*resume=PATH"):
        stage.rank_state().load(tmp_path)
