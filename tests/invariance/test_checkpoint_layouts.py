"""A checkpoint stays bit-identical from layout to layout: weights, moments and snapshot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.actor import platform
from megatron_rl.actor.model.policy import build_model
from megatron_rl.actor.optimizer.distributed import wrap_ddp
from megatron_rl.actor.optimizer.optimizer import Optimizer
from megatron_rl.actor.rank_state import RankState
from megatron_rl.checkpoint.manifest import (
    FORMAT,
    RNG,
    DriverState,
    Manifest,
    Origin,
    RandomStates,
    RankPart,
    read_checkpoint,
    write_manifest,
    write_rng,
)
from megatron_rl.checkpoint.shards import ShardTensors
from megatron_rl.config.actor import OptimizerSettings
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from tests import ranks
from tests.hf_models import config_json

DENSE = (
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(data=2),
    Layout(tensor=2, data=2, sequence_parallel=True),
    Layout(tensor=2, pipeline=2),
    Layout(),
)
EXPERTS = (Layout(), Layout(data=2, expert=2), Layout(pipeline=2), Layout(data=4, expert=2), Layout())
JOURNEYS = {
    "dense fp32": ("qwen3", "float32", DENSE),
    "dense bf16": ("qwen2", "bfloat16", DENSE),
    "experts bf16": ("qwen3_moe", "bfloat16", EXPERTS),
}
KINDS = ("weights", "exp_avg", "exp_avg_sq", "lagged")


@pytest.fixture(scope="module")
def journeys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with one subfolder per journey, each with one numbered subfolder per layout."""
    folder = tmp_path_factory.mktemp("journeys")
    for name, (_, _, itinerary) in JOURNEYS.items():
        for stop, where in enumerate(itinerary):
            ranks.run_ranks(load_and_write, where.world_size, stop, name, folder / name)
    return folder


@pytest.mark.parametrize("journey", JOURNEYS)
def test_every_layout_writes_exactly_what_it_loaded(journeys: Path, journey: str) -> None:
    layouts = JOURNEYS[journey][2]
    first, *rest = (tensors(journeys / journey / str(number)) for number in range(len(layouts)))
    assert all(tensor.count_nonzero() for tensor in first.values())
    for layout, other in zip(layouts[1:], rest, strict=True):
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == [], layout


def tensors(folder: Path) -> dict[str, Tensor]:
    manifest = read_checkpoint(folder)
    found = {
        f"{kind} {name}": tensor
        for kind in KINDS
        for name, tensor in ShardTensors(folder, manifest.files, kind).items()
    }
    return found | {"steps": torch.tensor(manifest.optimizer_steps)}


def load_and_write(rank: int, number: int, journey: str, folder: Path) -> None:
    """Runs one rank of the layout `number`: writes the first checkpoint, or loads the last one and writes it again."""
    model_type, dtype, layouts = JOURNEYS[journey]
    layout, config = layouts[number], config_json(model_type, tie_word_embeddings=model_type == "qwen3")
    source, target = folder / str(number - 1), folder / str(number)
    target.mkdir(parents=True, exist_ok=True)
    device = platform.prepare("cpu")
    meeting = torch.distributed.FileStore(f"{folder}/meeting-{number}")
    process_groups.init_process_groups(layout, rank=rank, store=meeting, device=device)
    model = build_model(config, layout=layout, dtype=getattr(torch, dtype), device=device)
    torch.manual_seed(number)
    for parameter in model.parameters():
        parameter.data.normal_()
    ddp = wrap_ddp(model, distributed_optimizer=layout.data > 1)
    optimizer = Optimizer([ddp], OptimizerSettings(lr=0.1), getattr(torch, dtype))
    snapshot: dict[str, Tensor] = {}
    if number:
        snapshot = RankState(model, config, optimizer, {}, layout, rank).load(source)
    else:
        snapshot = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.main_grad.normal_()
        optimizer.step(0.1)
    state = RankState(model, config, optimizer, snapshot, layout, rank)
    part = state.held().write(target) if number % 2 else state.write(target)
    parts: list[RankPart] = [part] * layout.world_size
    torch.distributed.all_gather_object(parts, part)
    if rank == 0:
        complete(target, layout, parts)
    process_groups.destroy()


def complete(folder: Path, layout: Layout, parts: list[RankPart]) -> None:
    """Adds what the driver would add."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    files[RNG] = write_rng(folder, RandomStates({}, [part.rng for part in parts]))
    origin = Origin({}, asdict(layout), "", {})
    write_manifest(folder, Manifest(FORMAT, DriverState(0, 0, {}), {}, origin, parts[0].optimizer_steps, files))
