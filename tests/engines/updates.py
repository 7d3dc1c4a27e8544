"""Weights of a model on disk, as an actor sends them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_rl.weight_sync.checksums import Checksums, ChecksumTaker
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import FolderUpdate

BUCKET = 300_000
"""Bytes of a bucket: an eighth of the model."""


def tensors(model: Path) -> list[tuple[str, torch.Tensor]]:
    """The tensors in the order in which an actor sends them."""
    order = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    weights = load_file(model / "model.safetensors")
    names = sorted(
        weights, key=lambda name: (name.split(".")[:3], [order.index(p) for p in name.split(".") if p in order])
    )
    return [(name, weights[name]) for name in names]


def in_folder(folder: Path, model: Path, version: int, spoilt: str = "") -> tuple[FolderUpdate, Checksums]:
    """spoilt: name of a tensor to write with wrong values."""
    transport = FolderTransport(folder, 0, BUCKET)
    transport.connect()
    named = ((name, tensor + 1 if name == spoilt else tensor) for name, tensor in tensors(model))
    pushed = transport.push(named, version, ChecksumTaker(1))
    assert pushed.checksums and len(pushed.parts) > 3
    return FolderUpdate(version, pushed.parts, take_checksums=True), pushed.checksums
