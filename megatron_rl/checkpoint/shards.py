"""The tensor files of a checkpoint: safetensors files of one kind of tensor each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.checkpoint.manifest import ShardFile
from megatron_rl.errors import UserError
from megatron_rl.utils.safetensors_files import write_safetensors

FILE_BYTES = 2 * 2**30
"""Largest size of a file of several tensors; a larger tensor gets a file of its own."""


def write_shard(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> ShardFile:
    """Writes CPU tensors to a file, which is on disk (fsync) when this returns. Returns its entry in the manifest."""
    size, sha256 = write_safetensors(path, tensors)
    return ShardFile(kind, size, sha256, tuple(tensors))


class ShardTensors(Mapping[str, Tensor]):
    """The tensors of one kind in a checkpoint by name. Each tensor is read from its file on access."""

    def __init__(self, folder: Path, files: Mapping[str, ShardFile], kind: str) -> None:
        self._folder = folder
        self._files = {name: file for file, entry in files.items() if entry.kind == kind for name in entry.tensors}
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Raises UserError if the file is damaged."""
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
