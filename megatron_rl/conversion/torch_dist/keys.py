"""Names of files, tensors and extra states in a distributed checkpoint of Megatron-core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Entry
from megatron_rl.models.fusion import split
from megatron_rl.utils.bounded import read_text

CONFIG, COMMON, INDEX, TRACKER = "metadata.json", "common.pt", ".metadata", "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron-LM's name for a checkpoint that belongs to no iteration."""
_LAYER_KEYS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Norms that Transformer Engine keeps in the linear layer after them: key of the norm -> key with the linear layer."""
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
"""Modules of a layer that may load an `_extra_state`: the scales of FP8, or None without FP8."""


def is_torch_dist(folder: Path) -> bool:
    return (folder / TRACKER).is_file() or ((folder / CONFIG).is_file() and (folder / INDEX).is_file())


def resolve(folder: Path) -> Path:
    """Returns the folder that holds the tensors: the checkpoint itself, or the newest one in a Megatron-LM save folder.

    Raises UserError if the save folder does not name its newest checkpoint.
    """
    if not (folder / TRACKER).is_file():
        return folder
    newest = read_text(folder / TRACKER, most=64).strip()
    if newest != RELEASE and not newest.isdecimal():
        raise UserError(f"{folder / TRACKER} names no checkpoint: {newest[:40]!r}. Name its folder itself.")
    return folder / (newest if newest == RELEASE else f"iter_{int(newest):07d}")


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a Megatron tensor in a checkpoint: the key of a stored tensor, and an index into its first axes."""

    key: str
    index: tuple[int, ...] = ()


def place_of(architecture: Architecture, entry: Entry) -> Place:
    """Returns the place where an entry is written."""
    return next(places(architecture, entry))


def places(architecture: Architecture, entry: Entry) -> Iterator[Place]:
    """Yields the places where an entry may be stored, starting with the place where it is written."""
    if entry.layer is None:
        yield Place(entry.rule.megatron)
        return
    name = entry.rule.megatron.removeprefix("decoder.layers.*.").replace("experts.local_experts.*.", "experts.experts.")
    fused = _LAYER_KEYS.get(name)
    names = [name] if fused is None else [fused, name]
    if name.startswith("pre_mlp") and architecture.is_sparse(entry.layer):
        names.reverse()  # in a sparse layer the norm is followed by the router, so it is stored on its own
    expert = () if entry.expert is None else (entry.expert,)
    for each in names:
        yield Place(f"decoder.layers.{entry.layer}.{each}", expert)
        yield Place(f"decoder.layers.{each}", (entry.layer, *expert))


def megatron_shape(architecture: Architecture, entry: Entry) -> tuple[int, ...]:
    """Returns the shape of the complete Megatron tensor, without padding."""
    tensors = [torch.empty(shape, device="meta") for shape in entry.hf_shapes(architecture)]
    return tuple(split(entry.rule.kind, tensors, architecture, 1, 0).shape)


def extra_states(architecture: Architecture) -> Iterator[str]:
    """Yields the keys of all extra states. Megatron refuses a checkpoint that lacks one and ignores unneeded ones."""
    for layer in range(architecture.layers):
        yield from (f"decoder.layers.{layer}.{module}._extra_state/shard_0_1" for module in _STATEFUL)
        if architecture.experts is not None and architecture.is_sparse(layer):
            for number in range(architecture.experts.count):
                for linear in ("linear_fc1", "linear_fc2"):
                    key = f"decoder.layers.{layer}.mlp.experts.experts.{linear}._extra_state"
                    yield f"{key}/shard_{number}_{architecture.experts.count}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
