"""Tensors in safetensors files: written one after another and hashed on the way, read when asked for."""

from __future__ import annotations

import hashlib
import itertools
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
HEADER_BYTES = 2**20
"""Of a file that grows: room for some 7,000 tensors."""
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
        starts = itertools.accumulate((tensor.nbytes for tensor in tensors.values()), initial=0)
        entries = {name: _entry(tensor, start) for (name, tensor), start in zip(tensors.items(), starts, strict=False)}
        parts: list[bytes | memoryview] = [_header(entries), *map(_bytes, tensors.values())]
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return ShardFile(kind, size, digest.hexdigest(), tuple(tensors))


class GrowingShard:
    """A safetensors file that takes one tensor at a time, so that no two need be in memory. Its header, for which room
    is left, comes last; until then the file is beside its place."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._entries: dict[str, Any] = {}
        self._file = path.with_suffix(".new").open("wb")
        self._file.seek(HEADER_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """From any device; it may change when this returns."""
        self._entries[name] = _entry(tensor, self.size)
        self._file.write(_bytes(tensor.cpu()))
        self.size += tensor.nbytes

    def close(self) -> None:
        """Put it in its place. Raises ValueError when it has more tensors than the header has room for."""
        with self._file as file:
            file.seek(0)
            file.write(_header(self._entries, HEADER_BYTES))
        Path(file.name).replace(self.path)


def _entry(tensor: Tensor, start: int) -> dict[str, Any]:
    end = start + tensor.nbytes
    return {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}


def _header(entries: Mapping[str, Any], size: int = 0) -> bytes:
    """Length and JSON, padded so that the data behind it is aligned, or to `size`."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    if size and 8 + len(text) > size:
        raise ValueError(f"{len(entries)} tensors are too many for one file: their names take more than {size} bytes")
    text += b" " * ((size - 8 - len(text)) if size else -len(text) % 8)
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
