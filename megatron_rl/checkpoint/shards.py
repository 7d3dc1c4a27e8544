"""Tensors in safetensors files: written one after another and hashed on the way, read when asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.checkpoint.manifest import ShardFile
from megatron_rl.errors import UserError

FILE_BYTES = 2 * 2**30
"""A file is full when it holds this much."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_shard(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> ShardFile:
    """Write CPU tensors as a safetensors file that is on disk when this returns.

    The safetensors package would hold Python's lock meanwhile, and training runs in another thread; it would copy the
    tensors, and a full disk would not be an OSError with a number.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        parts: list[bytes | memoryview] = [_header(tensors), *map(_bytes, tensors.values())]
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return ShardFile(kind, size, digest.hexdigest(), tuple(tensors))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON, padded so that the data behind it is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class ShardTensors(Mapping[str, Tensor]):
    """The tensors of one kind in a checkpoint, by name; each is read when asked for."""

    def __init__(self, folder: Path, files: Mapping[str, ShardFile], kind: str) -> None:
        self._folder = folder
        self._files = {name: file for file, entry in files.items() if entry.kind == kind for name in entry.tensors}
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._folder / self._files[name]
        try:
            if path.name not in self._open:
                self._open[path.name] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[path.name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}): choose another checkpoint with resume=PATH") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
