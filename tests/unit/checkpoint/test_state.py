"""A stage's training state, written and read back on one rank; other layouts are compared in tests/invariance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_rl.actor import platform, process_groups
from megatron_rl.actor.distributed import wrap_ddp
from megatron_rl.actor.layout import Layout
from megatron_rl.actor.model import build_model
from megatron_rl.actor.optimizer import Optimizer
from megatron_rl.actor.optimizer_state import read_state
from megatron_rl.checkpoint.state import STEPS, export_stage, load_stage, save_stage, write_tensors
from megatron_rl.config.actor import OptimizerSettings
from megatron_rl.errors import UserError
from tests.hf_models import config_json

CPU = torch.device("cpu")
CONFIG = config_json("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    platform.prepare("cpu")
    meeting: Path = tmp_path_factory.mktemp("groups") / "rendezvous"
    process_groups.init_process_groups(Layout(), rank=0, world_size=1, init_method=f"file://{meeting}", device=CPU)
    yield
    process_groups.destroy()
    torch.set_num_threads(threads)


class Stage:
    """A model with its optimizer, and steps with random gradients."""

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

    def everything(self) -> dict[str, torch.Tensor]:
        state, steps = read_state(self.optimizer, self.model)
        kinds = {"parameters": dict(self.model.named_parameters()), **state}
        values = {
            f"{kind} {name}": value.detach().clone() for kind, named in kinds.items() for name, value in named.items()
        }
        return values | {"steps": torch.tensor(steps)}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_stage_goes_on_as_the_saved_one(tmp_path: Path, dtype: torch.dtype) -> None:
    saved, loaded = Stage(0, dtype), Stage(1, dtype)
    for _ in range(3):
        saved.step()
    snapshot = {name: parameter.detach() + 1 for name, parameter in saved.model.named_parameters()}
    hashes = save_stage(tmp_path, saved.model, CONFIG, saved.optimizer, snapshot, stage=0, publishes=True)
    kinds = ("weights", "exp_avg", "exp_avg_sq", "lagged")
    assert hashes == {
        f"{kind}-stage-0.safetensors": hashlib.sha256(
            (tmp_path / f"{kind}-stage-0.safetensors").read_bytes()
        ).hexdigest()
        for kind in kinds
    }
    assert {path.name for path in tmp_path.iterdir()} == set(hashes)

    lagged = load_stage(tmp_path, loaded.model, CONFIG, loaded.optimizer)
    assert_same(saved.everything(), loaded.everything())
    assert_same(lagged, snapshot)

    loaded.random.set_state(saved.random.get_state())
    for stage in (saved, loaded):
        stage.step()
    assert_same(saved.everything(), loaded.everything())


def test_a_stage_that_has_not_stepped_is_saved_too(tmp_path: Path) -> None:
    saved, loaded = Stage(0, torch.float32), Stage(1, torch.float32)
    hashes = save_stage(tmp_path, saved.model, CONFIG, saved.optimizer, {}, stage=0, publishes=True)
    assert hashes is not None and not any(name.startswith("lagged") for name in hashes)
    assert load_stage(tmp_path, loaded.model, CONFIG, loaded.optimizer) == {}
    assert_same(saved.everything(), loaded.everything())


def test_only_the_publishing_rank_writes(tmp_path: Path) -> None:
    stage = Stage(0, torch.float32)
    assert save_stage(tmp_path, stage.model, CONFIG, stage.optimizer, {}, stage=0, publishes=False) is None
    assert export_stage(tmp_path, stage.model, CONFIG, 0, 1, publishes=False) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "stages", "file"), [(0, 1, "model.safetensors"), (1, 2, "model-00002-of-00002.safetensors")]
)
def test_an_exported_shard_says_what_is_in_it(tmp_path: Path, stage: int, stages: int, file: str) -> None:
    shard = export_stage(tmp_path, Stage(0, torch.float32).model, CONFIG, stage, stages, publishes=True)
    assert shard is not None and shard["file"] == file
    tensors = load_file(tmp_path / file)
    assert sorted(shard["tensors"]) == sorted(tensors)
    assert shard["bytes"] == sum(t.nbytes for t in tensors.values())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    stage = Stage(0, torch.float32)
    save_stage(tmp_path, stage.model, CONFIG, stage.optimizer, {}, stage=0, publishes=True)
    path = tmp_path / "exp_avg-stage-0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{path} is damaged .*resume=PATH"):
        load_stage(tmp_path, stage.model, CONFIG, stage.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_written_tensors_are_read_by_safetensors_itself(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 4).to(dtype).T, "b": torch.tensor(1.5, dtype=dtype)}
    digest = write_tensors(tmp_path / "x.safetensors", tensors, {STEPS: "12"})
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert_same(load_file(tmp_path / "x.safetensors"), tensors)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", STEPS: "12"}
