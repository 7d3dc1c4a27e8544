"""What everything is called in a distributed checkpoint of Megatron-core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry
from megatron_rl.models.fusion import split

CONFIG, COMMON, INDEX, TRACKER = "metadata.json", "common.pt", ".metadata", "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron-LM's name of a checkpoint that belongs to no iteration."""
_LAYER_KEYS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""A norm that Transformer Engine keeps in the linear layer after it."""
_STATEFUL = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that may ask for an `_extra_state`: FP8's scales, None without FP8."""


def is_torch_dist(folder: Path) -> bool:
    return (folder / TRACKER).is_file() or ((folder / CONFIG).is_file() and (folder / INDEX).is_file())


def resolve(folder: Path) -> Path:
    """The folder that holds the tensors: the checkpoint itself, or the newest of a Megatron-LM save folder. Raises
    UserError when that folder does not say which."""
    if not (folder / TRACKER).is_file():
        return folder
    newest = (folder / TRACKER).read_text().strip()
    if newest != RELEASE and not newest.isdecimal():
        raise UserError(f"{folder / TRACKER} names no checkpoint: {newest[:40]!r}. Name its folder itself.")
    return folder / (newest if newest == RELEASE else f"iter_{int(newest):07d}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a checkpoint a Megatron tensor is: a part of the tensor of a key, at an index of its first axes."""

    key: str
    index: tuple[int, ...] = ()


def place_of(architecture: Architecture, entry: Entry) -> Place:
    """Where it is written."""
    return next(places(architecture, entry))


def places(architecture: Architecture, entry: Entry) -> Iterator[Place]:
    """Where it may be read from, the first where it is written."""
    if entry.layer is None:
        yield Place(entry.rule.megatron)
        return
    name = entry.rule.megatron.removeprefix("decoder.layers.*.").replace("experts.local_experts.*.", "experts.experts.")
    fused = _LAYER_KEYS.get(name)
    names = [name] if fused is None else [fused, name]
    if name.startswith("pre_mlp") and architecture.is_sparse(entry.layer):
        names.reverse()  # the router is what comes after it there
    expert = () if entry.expert is None else (entry.expert,)
    for each in names:
        yield Place(f"decoder.layers.{entry.layer}.{each}", expert)
        yield Place(f"decoder.layers.{each}", (entry.layer, *expert))


def megatron_shape(architecture: Architecture, entry: Entry) -> tuple[int, ...]:
    """Of the whole Megatron tensor, without padding."""
    tensors = [torch.empty(shape, device="meta") for shape in entry.hf_shapes(architecture)]
    return tuple(split(entry.rule.kind, tensors, architecture, 1, 0).shape)


def extra_states(architecture: Architecture) -> Iterator[str]:
    """Megatron refuses a checkpoint that lacks one; it passes over those that its model has no use for."""
    for layer in range(architecture.layers):
        yield from (f"decoder.layers.{layer}.{module}._extra_state/shard_0_1" for module in _STATEFUL)
        if architecture.experts is not None and architecture.is_sparse(layer):
            for number in range(architecture.experts.count):
                for linear in ("linear_fc1", "linear_fc2"):
                    key = f"decoder.layers.{layer}.mlp.experts.experts.{linear}._extra_state"
                    yield f"{key}/shard_{number}_{architecture.experts.count}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
