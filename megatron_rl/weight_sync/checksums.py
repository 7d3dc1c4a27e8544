"""Checksums of the weights that were sent, to compare with those that an engine holds.

An engine with Hugging Face modules holds the tensors as sent. SGLang and vLLM fuse q, k and v into one tensor and gate
and up into another, and each rank holds its part. Checksums of these are taken while the tensors pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_rl.utils import heartbeat
from megatron_rl.weight_sync.digest import host_bytes
from megatron_rl.weight_sync.digest_queue import DigestQueue

VOCABULARY_MULTIPLE = 64
"""SGLang and vLLM pad the vocabulary with zeros to a multiple of this."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""A server's tensors that consist of several sent ones, in this order."""
_FUSED_OF = {part: fused for fused, parts in _FUSED.items() for part in parts}
_KEY_OR_VALUE = ("k_proj", "v_proj")
_BY_COLUMN = ("o_proj", "down_proj")
_BY_VOCABULARY = ("embed_tokens", "lm_head")


class WeightsDamaged(RuntimeError):
    """The weights that an engine holds differ from those that were sent."""


class NotComparable(Exception):
    """The engine reports checksums of another kind than the sender took."""


@dataclass(frozen=True, slots=True)
class Checksums:
    """Digests of tensors (`digest.py`), by name."""

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


LEAST_DIGITS = 16
"""Hexadecimal digits that a reported checksum must have to prove anything."""


class ChecksumTaker:
    """Takes checksums of tensors that pass one at a time. q, k, v must come in this order, and gate before up."""

    def __init__(self, ranks: int, kv_heads: int | None = None) -> None:
        """ranks: number of tensor-parallel ranks of an engine. kv_heads: number of heads of k and v, which an engine
        with more ranks than heads replicates; None: as many as ranks, or more."""
        self._ranks, self._kv_heads = ranks, kv_heads or ranks
        self._queue = DigestQueue()
        self._plain: dict[str, Future[str]] = {}
        self._fused: dict[str, Future[str]] = {}
        self._parts: dict[str, list[list[Tensor]]] = {}
        """Parts of incomplete fused tensors, by name, then by rank."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the checksums of a tensor, on a CPU in other threads. The tensor's memory may be reused at once."""
        if tensor.device.type == "cpu":
            tensor = tensor.detach().clone()
        whole = self._plain[name] = self._queue.add(tensor)
        *path, module, kind = name.split(".")
        if "experts" in path:
            return
        pieces = rank_pieces(module, tensor, self._ranks, self._kv_heads)
        if (fused := _FUSED_OF.get(module)) is None:
            for rank, piece in enumerate(pieces):
                unchanged = piece.shape == tensor.shape
                self._fused[f"{rank}:{name}"] = whole if unchanged else self._queue.add(piece)
            return
        fused_name = ".".join([*path, fused, kind])
        parts = self._parts.setdefault(fused_name, [])
        # On a GPU the tensor's memory may be reused for the next one.
        parts.append(pieces if tensor.device.type == "cpu" else [piece.clone() for piece in pieces])
        if len(parts) == len(_FUSED[fused]):
            for rank, of_rank in enumerate(zip(*self._parts.pop(fused_name), strict=True)):
                largest = max(of_rank, key=lambda piece: piece.nbytes)
                self._fused[f"{rank}:{fused_name}"] = self._queue.add(largest, partial(torch.cat, of_rank))

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields the same tensors, taking the checksum of each."""
        for name, tensor in tensors:
            heartbeat.notify(f"taking the checksum of {name}")
            self.add(name, tensor)
            yield name, tensor

    def result(self) -> Checksums:
        """Returns the checksums once all are taken. A fused tensor of which a part never came has none."""
        heartbeat.notify("taking the last checksums")
        plain, fused = ({name: value.result() for name, value in d.items()} for d in (self._plain, self._fused))
        return Checksums(plain, fused)


def rank_pieces(module: str, tensor: Tensor, ranks: int, kv_heads: int) -> list[Tensor]:
    """Returns the part of a tensor that each tensor-parallel rank of SGLang or vLLM holds.

    module: the last name of the tensor's module, such as `q_proj`. A server that needs another layout, because the
    ranks do not divide a dimension, does not start. vLLM pads the vocabulary to a multiple of 64, and SGLang to a
    multiple of 64 times the ranks if the ranks do not divide that multiple.
    """
    if module in _BY_VOCABULARY:
        length = tensor.shape[0] + -tensor.shape[0] % VOCABULARY_MULTIPLE
        if length % ranks:
            length = tensor.shape[0] + -tensor.shape[0] % (VOCABULARY_MULTIPLE * ranks)
        return _padded_chunks(tensor, length // ranks, ranks)
    if module in _KEY_OR_VALUE and ranks > kv_heads:
        return [piece for piece in tensor.chunk(kv_heads) for _ in range(ranks // kv_heads)]
    if module in _FUSED_OF:
        return list(tensor.chunk(ranks))
    if module in _BY_COLUMN and tensor.dim() == 2:
        return list(tensor.chunk(ranks, dim=1))
    return [tensor] * ranks


def _padded_chunks(tensor: Tensor, length: int, count: int) -> list[Tensor]:
    """Returns `count` pieces of `length` rows; rows that the tensor lacks are zeros."""
    pieces = []
    for rank in range(count):
        piece = tensor[rank * length : (rank + 1) * length]
        missing = length - piece.shape[0]
        pieces.append(torch.cat([piece, piece.new_zeros(missing, *tensor.shape[1:])]) if missing else piece)
    return pieces


def tensor_checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of the values: a fast checksum for data that stays on this machine."""
    return zlib.crc32(host_bytes(tensor))


def compare(sent: Mapping[str, str], held: Mapping[str, str], version: int) -> int:
    """Compare the checksums of the names that both sides have, and return their number.

    A server may report only the first digits of a checksum. Raises WeightsDamaged if checksums differ or no name is
    common, and NotComparable if the checksums are of different algorithms.
    """
    common = sent.keys() & held.keys()
    algorithms = [{digests[name].partition(":")[0] for name in common} for digests in (sent, held)]
    if algorithms[0] != algorithms[1]:
        ours, theirs = (" and ".join(sorted(kinds)) for kinds in algorithms)
        raise NotComparable(
            f"weights of version {version} cannot be compared: the actor took checksums of the kind {ours}, the engine "
            f"of the kind {theirs}. A CPU takes sha256 and a GPU takes tiles: run the actor and the engine on the same "
            "kind of device"
        )
    wrong = sorted(
        name
        for name in common
        if len(held[name].partition(":")[2]) < LEAST_DIGITS or not sent[name].startswith(held[name])
    )
    if wrong or not common:
        raise WeightsDamaged(
            f"weights of version {version} arrived damaged: {len(wrong)} of {len(common)} tensors differ"
            + (f", the first is {wrong[0]}" if wrong else ": the engine knows none of the names")
        )
    return len(common)
