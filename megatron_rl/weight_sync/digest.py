"""Digests of tensors, computed where a tensor lies: SHA-256 of a tensor on a CPU, tile hashes of a tensor on a GPU.

SGLang makes the same distinction when it reports the digests of its weights (`mm_utils.tensor_hash`). SHA-256 of the
weights of a 32B model takes minutes, and needs them in host memory; tile hashes are some eighty elementwise operations
on the GPU, which has not been run on one yet.

A digest is a text `algorithm:hexadecimal digits`, so that digests of different algorithms are never compared.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["sha256", "tiles"]

TILE_WORDS = 8192
CHUNK_WORDS = 1024 * TILE_WORDS
"""Words of a tensor that are hashed at a time; each operation on them needs 32 MiB of temporary memory."""
_MASK32, _MASK64 = 2**32 - 1, 2**64 - 1
_SEED = 0x243F6A88
_LANES = (
    (0x27D4EB2D, _SEED, 15),
    (0x165667B1, (_SEED * 0x9E3779B1 ^ 0xDEADBEEF) & _MASK32, 13),
)
"""For each of the two 32-bit lanes: the factor of a word's position, the summand, and the rotation of the position."""


def algorithm_on(device: str) -> Algorithm:
    """Returns the algorithm for tensors on a device, given by its type (`cuda`) or name (`cuda:0`)."""
    return "sha256" if device.startswith("cpu") else "tiles"


def digest(tensor: Tensor) -> str:
    """Returns the digest of the values, regardless of strides."""
    if algorithm_on(tensor.device.type) == "sha256":
        return f"sha256:{hashlib.sha256(host_bytes(tensor)).hexdigest()}"
    return f"tiles:{tile_hash(tensor):016x}"


def host_bytes(tensor: Tensor) -> memoryview:
    """Returns the values of a tensor as bytes in host memory."""
    return _bytes(tensor.cpu()).numpy().data


def tile_hash(tensor: Tensor) -> int:
    """Returns the 64-bit hash that SGLang's `gpu_tensor_hash` (0.5.23) computes with Triton kernels.

    The tensor's bytes are padded with zeros to 32-bit words. In each of two lanes, a word is combined with its position
    and mixed; the mixed words of a tile are added up, and the sum is mixed with the tensor's size. Both lanes make a
    tile's 64-bit hash, and the hashes of all tiles are added up and mixed. All sums are modulo a power of two.
    """
    words = _words(tensor)
    if not words.numel():
        return 0
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    size = 4 * words.numel()
    for start in range(0, words.numel(), CHUNK_WORDS):
        total += _tiles(words[start : start + CHUNK_WORDS], start, size)
    return _splitmix(int(total) & _MASK64)


def _tiles(words: Tensor, start: int, size: int) -> Tensor:
    """Returns the sum of the 64-bit hashes of the tiles that the words fill; int64, modulo 2^64.

    words: int32 [W], of which the first has the position `start`.
    """
    positions = torch.arange(start, start + words.numel(), device=words.device).to(torch.int32)
    high, low = (_lane(words, positions, size, *constants) for constants in _LANES)
    return ((high << 32) | low).sum()


def _lane(words: Tensor, positions: Tensor, size: int, factor: int, summand: int, rotation: int) -> Tensor:
    """Returns a lane of each tile's hash: int64 [tiles], from 0 to 2^32 - 1."""
    rotated = (positions << rotation) | _shifted_right(positions, 32 - rotation)
    mixed = _fmix32(((positions * _signed(factor) + _signed(summand)) ^ rotated).bitwise_xor_(words))
    padding = -mixed.numel() % TILE_WORDS
    tiles = torch.nn.functional.pad(mixed, (0, padding)).view(-1, TILE_WORDS)
    sums = (tiles.sum(1, dtype=torch.int64) ^ size) & _MASK32
    return _fmix32(sums.to(torch.int32)).to(torch.int64) & _MASK32


def _fmix32(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3, in place, on int32 in place of unsigned integers."""
    x.bitwise_xor_(_shifted_right(x, 16)).mul_(_signed(0x85EBCA6B))
    x.bitwise_xor_(_shifted_right(x, 13)).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_(_shifted_right(x, 16))


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """Shifts int32 to the right as if it were unsigned."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _splitmix(x: int) -> int:
    """The finalizer of SplitMix64."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK64
    return x ^ x >> 31


def _words(tensor: Tensor) -> Tensor:
    """Returns the bytes as int32 words, padded with zeros."""
    data = _bytes(tensor)
    if missing := -data.numel() % 4:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.storage_offset() % 4:  # a view of wider words must be aligned
        data = data.clone()
    return data.view(torch.int32)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _signed(x: int) -> int:
    """The int32 with the bits of an unsigned integer."""
    return x - 2**32 if x >= 2**31 else x
