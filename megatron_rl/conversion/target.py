"""The target of a conversion. Each tensor is read, cast, hashed, written and dropped before the next one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.conversion.source import HF_FILES, Rounded, Source
from megatron_rl.conversion.torch_dist import write_torch_dist
from megatron_rl.models.families import Entry, entries
from megatron_rl.models.fusion import split
from megatron_rl.models.hf_format import copy_all_but_weights
from megatron_rl.models.hf_shards import finish_hf_folder, write_hf_shards
from megatron_rl.weight_sync.checksums import tensor_checksum


@dataclass
class Target:
    """Writes a source's tensors to a target and remembers their checksums."""

    source: Source
    dtype: torch.dtype | None
    """Dtype to write. None means that of the source."""
    advance: Callable[[int], None]
    """Called with the bytes of each tensor, for a progress bar."""
    checksums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of each tensor written, by Hugging Face name."""

    def __post_init__(self) -> None:
        weights = self.source.weights
        self.weights = weights if self.dtype is None else Rounded(weights, self.dtype)

    @property
    def bytes(self) -> int:
        """Total bytes of the tensors to write."""
        architecture = self.source.architecture
        return sum(
            math.prod(shape) * self.weights.dtype(entry).itemsize
            for entry in entries(architecture)
            for shape in entry.hf_shapes(architecture)
        )

    def as_hf(self, folder: Path, max_shard_bytes: int) -> None:
        copy_all_but_weights(self.source.hf_folder, folder)
        finish_hf_folder(folder, write_hf_shards(folder, self._named(), max_shard_bytes))

    def as_torch_dist(self, folder: Path, max_file_bytes: int) -> None:
        architecture = self.source.architecture

        def megatron(entry: Entry) -> Tensor:
            return split(entry.rule.kind, list(self._read(entry)), architecture, 1, 0)

        write_torch_dist(folder, architecture, self.weights.dtype, megatron, max_file_bytes)
        copy_all_but_weights(self.source.hf_folder, folder / HF_FILES)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for entry in entries(self.source.architecture):
            yield from zip(entry.hf_names, self._read(entry), strict=True)

    def _read(self, entry: Entry) -> tuple[Tensor, ...]:
        tensors = self.weights.read(entry)
        for name, tensor in zip(entry.hf_names, tensors, strict=True):
            self.checksums[name] = tensor_checksum(tensor)
            self.advance(tensor.nbytes)
        return tensors
