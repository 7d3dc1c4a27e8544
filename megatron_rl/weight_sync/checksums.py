"""SHA-256 checksums of the weights that were sent, to compare with those that an engine holds.

An engine with Hugging Face modules holds the tensors as sent. SGLang and vLLM fuse q, k and v into one tensor and gate
and up into another, and each rank holds its part. Checksums of these are taken while the tensors pass: hashing the
parts in order gives the hash of the fused tensor.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY_MULTIPLE = 64
"""SGLang and vLLM pad the vocabulary with zeros to a multiple of this."""

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_BY_COLUMN = ("o_proj", "down_proj")
_BY_VOCABULARY = ("embed_tokens", "lm_head")


class WeightsDamaged(RuntimeError):
    """The weights that an engine holds differ from those that were sent."""


@dataclass(frozen=True, slots=True)
class Checksums:
    """SHA-256 of tensors in hexadecimal, by name."""

    plain: dict[str, str]
    """Checksums of the tensors as sent, by Hugging Face name."""
    fused: dict[str, str]
    """Checksums of a server's tensors, by `rank:name`. Experts are left out: each server has its own layout of them."""

    @staticmethod
    def merge(parts: Iterable[Checksums]) -> Checksums:
        """Returns the checksums of all pipeline stages together."""
        parts = list(parts)
        return Checksums(
            {name: value for part in parts for name, value in part.plain.items()},
            {name: value for part in parts for name, value in part.fused.items()},
        )


class ChecksumTaker:
    """Takes checksums of tensors that pass one at a time. q, k, v must come in this order, and gate before up."""

    def __init__(self, ranks: int) -> None:
        """ranks: number of tensor-parallel ranks of an engine."""
        self._ranks = ranks
        self._plain: dict[str, str] = {}
        self._fused: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._plain[name] = sha256(tensor)
        for rank, (fused, piece) in enumerate(_pieces(name, tensor, self._ranks)):
            self._fused.setdefault(f"{rank}:{fused}", hashlib.sha256()).update(_bytes(piece))

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the same tensors, taking the checksum of each."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def result(self) -> Checksums:
        return Checksums(dict(self._plain), {name: digest.hexdigest() for name, digest in self._fused.items()})


def sha256(tensor: Tensor) -> str:
    """Returns the SHA-256 of the values, regardless of strides and device."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def tensor_checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of the values: a fast checksum for data that stays on this machine."""
    return zlib.crc32(_bytes(tensor))


def compare(sent: Mapping[str, str], held: Mapping[str, str], version: int) -> int:
    """Compare the checksums of the names that both sides have, and return their number.

    A server may report only the first digits of a checksum. Raises WeightsDamaged if checksums differ or no name is
    common.
    """
    common = sent.keys() & held.keys()
    wrong = sorted(name for name in common if not held[name] or not sent[name].startswith(held[name]))
    if wrong or not common:
        raise WeightsDamaged(
            f"weights of version {version} arrived damaged: {len(wrong)} of {len(common)} tensors differ"
            + (f", the first is {wrong[0]}" if wrong else ": the engine knows none of the names")
        )
    return len(common)


def _pieces(name: str, tensor: Tensor, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """Yields, rank by rank, a server's name of the tensor and the rank's part of it."""
    *path, module, kind = name.split(".")
    if "experts" in path:
        return
    fused = ".".join([*path, _FUSED.get(module, module), kind])
    if module in _BY_VOCABULARY:
        missing = -tensor.shape[0] % (VOCABULARY_MULTIPLE * ranks)
        padded = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        yield from ((fused, piece) for piece in padded.chunk(ranks))
    elif module in _FUSED:
        yield from ((fused, piece) for piece in tensor.chunk(ranks))
    elif module in _BY_COLUMN and tensor.dim() == 2:
        yield from ((fused, piece) for piece in tensor.chunk(ranks, dim=1))
    else:
        yield from ((fused, tensor) for _ in range(ranks))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
