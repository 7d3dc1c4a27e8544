"""The processes of `test_conversion_layouts.py`: load weights into Megatron and export them, in every supported way."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.actor import platform
from megatron_rl.actor.model.policy import build_model
from megatron_rl.conversion.proof import fill_by_megatron
from megatron_rl.conversion.torch_dist import TorchDistWeights, write_torch_dist
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry, entries
from megatron_rl.models.fused_experts import as_stored
from megatron_rl.models.fusion import split
from megatron_rl.models.weight_map import export_hf_weights, load_hf_weights, publish_hf_weights
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from tests.hf_models import config_json, hf_model

SIZES = (1, 2, 3, 4)
LAYOUTS = {f"tp{tensor}-pp{pipeline}": (tensor, pipeline) for tensor, pipeline in product(SIZES, SIZES)}
SAVED = ("tp1-pp1", "tp2-pp1", "tp3-pp2", "tp1-pp4", "tp4-pp1")
"""Layouts under which Megatron itself writes a checkpoint, with stacked layers and with separate layers."""
SHAPE = dict(
    vocab_size=53,  # prime, so every degree above 1 needs padding
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=24,
    num_key_value_heads=12,
    head_dim=4,
)
CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "hidden_size": 96},
    "llama": {"model_type": "llama", "attention_bias": True},
    "qwen3-moe": {"model_type": "qwen3_moe", "mlp_only_layers": [2]},
}
CPU = torch.device("cpu")
Differences = dict[str, dict[str, dict[str, float]]]
"""Layout -> case -> way -> largest difference on one rank."""


@dataclass(frozen=True)
class Model:
    hf_config: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path
    """A Megatron checkpoint that this project wrote."""

    @property
    def architecture(self) -> Architecture:
        return Architecture.from_hf(self.hf_config)


def prepare(case: str, folder: Path) -> Model:
    settings = SHAPE | CASES[case]
    reference = hf_model(seed=3, noise=0.1, **settings)
    tensors = as_stored({name: parameter.detach() for name, parameter in reference.named_parameters()})
    model = Model(config_json(**settings), tensors, folder / case)

    def megatron(entry: Entry) -> Tensor:
        return split(entry.rule.kind, [tensors[name] for name in entry.hf_names], model.architecture, 1, 0)

    write_torch_dist(model.folder, model.architecture, lambda _: torch.float32, megatron)
    return model


def measure(model: Model, layout: Layout, folder: Path) -> dict[str, float]:
    """Returns the largest difference for each way of loading or exporting."""
    expected = build_model(model.hf_config, layout=layout, dtype=torch.float32, device=CPU)
    load_hf_weights(expected, model.hf_config, model.tensors)
    exported = dict(export_hf_weights(expected, model.hf_config))
    found = {"export": difference(exported, model.tensors)}
    published = dict(publish_hf_weights(expected, model.hf_config))
    assert published.keys() == (exported.keys() if process_groups.tp_rank() == 0 else set())
    found["published"] = difference(published, exported) if published else 0.0
    loaded = build_model(model.hf_config, layout=layout, dtype=torch.float32, device=CPU)
    fill_by_megatron(model.folder)(loaded)
    found["Megatron reads ours"] = difference(dict(loaded.named_parameters()), dict(expected.named_parameters()))
    if f"tp{layout.tensor}-pp{layout.pipeline}" in SAVED:
        for name, by_layer in (("stacked", False), ("by layer", True)):
            found[f"we read Megatron's, {name}"] = round_trip(
                model, expected, folder / name.replace(" ", "-"), by_layer
            )
    return found


def round_trip(model: Model, expected: GPTModel, folder: Path, by_layer: bool) -> float:
    """Returns the largest difference of a checkpoint that Megatron writes and this project reads."""
    rank = torch.distributed.get_rank()
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    metadata = {"dp_cp_group": process_groups.dp_group(), "non_homogeneous_layers": by_layer}
    dist_checkpointing.save({"model": expected.sharded_state_dict(metadata=metadata), "iteration": 7}, str(folder))
    torch.distributed.barrier()
    if rank:
        return 0.0
    weights = TorchDistWeights(folder, model.architecture)
    read = {
        name: tensor
        for entry in entries(model.architecture)
        for name, tensor in zip(entry.hf_names, weights.read(entry), strict=True)
    }
    assert read.keys() == model.tensors.keys()
    return difference(read, model.tensors)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest difference over the tensors in `found`; a stage holds only part of the model."""
    assert found
    return max(float((tensor - expected[name]).abs().max()) for name, tensor in found.items())


def run_rank(rank: int, models: dict[str, Model], names: list[str], folder: Path) -> Differences:
    """Returns the differences under each of the layouts that this rank is part of."""
    platform.prepare("cpu")
    torch.cuda.synchronize = torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]  # for Megatron's writer
    measured: Differences = {}
    for name in names:
        tensor, pipeline = LAYOUTS[name]
        layout = Layout(tensor=tensor, pipeline=pipeline, sequence_parallel=tensor > 1)
        if rank >= layout.world_size:
            continue
        meeting = torch.distributed.FileStore(f"{folder}/{name}")
        process_groups.init_process_groups(layout, rank=rank, store=meeting, device=CPU)
        measured[name] = {
            case: measure(model, layout, folder / "saved" / name / case) for case, model in models.items()
        }
        process_groups.destroy()
    return measured
