"""Conversion needs memory for a few tensors and one file, not for the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from megatron_rl.conversion.convert import convert
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import entries, parameters
from tests import ranks
from tests.hf_models import config_json
from tests.tiers import slow

MIB = 2**20
SHARD = 16 * MIB
LAYERS = 16


def peak() -> int:
    """Returns the most memory in bytes that this process has had, after its fork from the server."""
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024


def convert_it(rank: int, source: Path, target: Path) -> int:
    before = peak()
    convert(source, target, max_shard_bytes=SHARD, logits=False, console=Console(quiet=True))
    return peak() - before


def write_model(folder: Path) -> int:
    """Write a bf16 model of random weights with one file per layer. Returns the bytes of the weights."""
    folder.mkdir()
    config = config_json(
        hidden_size=1024,
        intermediate_size=2560,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=4000,
    )
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    architecture = Architecture.from_hf(config)
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for entry in entries(architecture):
        layer = LAYERS if entry.layer is None else entry.layer
        shapes = zip(entry.hf_names, entry.hf_shapes(architecture), strict=True)
        by_layer.setdefault(layer, {}).update({name: torch.randn(shape).bfloat16() for name, shape in shapes})
    weight_map = {name: f"part-{layer}.safetensors" for layer, tensors in by_layer.items() for name in tensors}
    for layer, tensors in by_layer.items():
        save_file(tensors, folder / f"part-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 2 * parameters(architecture)


@slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from Linux's /proc")
def test_a_model_is_converted_in_a_fraction_of_its_size(tmp_path: Path) -> None:
    size = write_model(tmp_path / "hf")
    assert size > 320 * MIB
    for source, target in (("hf", "megatron"), ("megatron", "back")):
        (used,) = ranks.run_ranks(convert_it, 1, tmp_path / source, tmp_path / target)
        assert used < 6 * SHARD, f"{source} to {target}: {used / MIB:.0f} MiB"
