"""SHA-256 of weights as they were sent, to compare with what an engine holds.

An engine with Hugging Face's modules holds the tensors as they are. SGLang and vLLM hold q, k and v as one tensor, gate
and up as another, each rank its part: their checksums are taken as the tensors pass, a hash over the parts in order
being the hash of the whole.
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
"""SGLang and vLLM pad the vocabulary, with zeros."""

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
    """What an engine holds is not what was sent."""


@dataclass(frozen=True, slots=True)
class Checksums:
    """Name -> SHA-256, in hexadecimal."""

    plain: dict[str, str]
    """Of the tensors as sent, by Hugging Face name."""
    fused: dict[str, str]
    """Of a server's tensors, as `rank:name`. Experts are not among them: servers lay them out each in its own way."""

    @staticmethod
    def merge(parts: Iterable[Checksums]) -> Checksums:
        """Of all pipeline stages."""
        parts = list(parts)
        return Checksums(
            {name: value for part in parts for name, value in part.plain.items()},
            {name: value for part in parts for name, value in part.fused.items()},
        )


class ChecksumTaker:
    """Takes the checksums of tensors that pass one at a time, q, k, v and gate, up in this order."""

    def __init__(self, ranks: int) -> None:
        """ranks: tensor-parallel ranks of an engine."""
        self._ranks = ranks
        self._plain: dict[str, str] = {}
        self._fused: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._plain[name] = sha256(tensor)
        for rank, (fused, piece) in enumerate(_pieces(name, tensor, self._ranks)):
            self._fused.setdefault(f"{rank}:{fused}", hashlib.sha256()).update(_bytes(piece))

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same ones, each taken on its way."""
        for name, tensor in tensors:
            self.add(name, tensor)
            yield name, tensor

    def result(self) -> Checksums:
        return Checksums(dict(self._plain), {name: digest.hexdigest() for name, digest in self._fused.items()})


def sha256(tensor: Tensor) -> str:
    """Of the values, whatever the tensor's strides and device."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def tensor_checksum(tensor: Tensor) -> int:
    """CRC-32 of the values: quick, for what never leaves this machine."""
    return zlib.crc32(_bytes(tensor))


def compare(sent: Mapping[str, str], held: Mapping[str, str], version: int) -> int:
    """The number of checksums compared: of the names in both. Raises WeightsDamaged where they differ.

    A server may give the first digits of a checksum only.
    """
    common = sent.keys() & held.keys()
    wrong = sorted(name for name in common if not held[name] or not sent[name].startswith(held[name]))
    if wrong or not common:
        raise WeightsDamaged(
            f"weights of version {version} arrived damaged: {len(wrong)} of {len(common)} tensors differ"
            + (f", the first is {wrong[0]}" if wrong else ": none of the names is known to the engine")
        )
    return len(common)


def _pieces(name: str, tensor: Tensor, ranks: int) -> Iterator[tuple[str, Tensor]]:
    """A server's name, and the part of each rank."""
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
