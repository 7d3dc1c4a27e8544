"""Writing safetensors files: all tensors at once and hashed on the way, or one tensor after another.

The safetensors package is not used for this: it would hold Python's lock while it writes, and training runs in another
thread; it would copy the tensors; and a full disk would not raise an OSError with its errno.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER_BYTES = 2**20
"""Header size of a file that is written one tensor at a time: enough for some 7,000 tensors."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes CPU tensors to a file, which is on disk (fsync) when this returns.

    Returns the file's size in bytes and its SHA-256 in hexadecimal.
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
    return size, digest.hexdigest()


class SafetensorsWriter:
    """Writes a safetensors file one tensor at a time, so that no two tensors have to be in memory together.

    Space for the header is reserved at the start, and `close` fills it in. Until then the data is in a `.new` file
    beside `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._entries: dict[str, Any] = {}
        self._file = path.with_suffix(".new").open("wb")
        self._file.seek(HEADER_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor from any device. The tensor may change when this returns."""
        self._entries[name] = _entry(tensor, self.size)
        self._file.write(_bytes(tensor.cpu()))
        self.size += tensor.nbytes

    def close(self) -> None:
        """Writes the header and moves the file to `path`. Raises ValueError if the header does not hold all names."""
        with self._file as file:
            file.seek(0)
            file.write(_header(self._entries, HEADER_BYTES))
        Path(file.name).replace(self.path)


def _entry(tensor: Tensor, start: int) -> dict[str, Any]:
    end = start + tensor.nbytes
    return {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}


def _header(entries: Mapping[str, Any], size: int = 0) -> bytes:
    """Returns the length and the JSON, padded to `size`, or by default so that the data after it is aligned."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    if size and 8 + len(text) > size:
        raise ValueError(f"{len(entries)} tensors are too many for one file: their names take more than {size} bytes")
    text += b" " * ((size - 8 - len(text)) if size else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
