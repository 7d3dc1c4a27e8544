"""The tile hash against a plain statement of its formula. tests/engines compares it with SGLang's own kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.weight_sync import digest as module
from megatron_rl.weight_sync.digest import algorithm_on, digest, tile_hash
from tests.tiers import examples

MASK = 2**32 - 1


def fmix(x: int) -> int:
    x = ((x ^ x >> 16) * 0x85EBCA6B) & MASK
    x = ((x ^ x >> 13) * 0xC2B2AE35) & MASK
    return x ^ x >> 16


def rotated(x: int, bits: int) -> int:
    return (x << bits | x >> (32 - bits)) & MASK


def plain(data: bytes) -> int:
    """The formula, word by word, with Python's integers."""
    data += bytes(-len(data) % 4)
    words = np.frombuffer(data, dtype="<u4").tolist()
    seed = 0x243F6A88
    seeds = (seed, (seed * 0x9E3779B1 ^ 0xDEADBEEF) & MASK)
    total = 0
    for start in range(0, len(words), 8192):
        lanes = []
        for factor, summand, bits in ((0x27D4EB2D, seeds[0], 15), (0x165667B1, seeds[1], 13)):
            mixed = (
                fmix(word ^ ((i * factor + summand) & MASK) ^ rotated(i, bits))
                for i, word in enumerate(words[start : start + 8192], start=start)
            )
            lanes.append(fmix((sum(mixed) ^ len(data)) & MASK))
        total += lanes[0] << 32 | lanes[1]
    total &= 2**64 - 1
    total = ((total ^ total >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    total = ((total ^ total >> 27) * 0x94D049BB133111EB) & (2**64 - 1)
    return total ^ total >> 31 if words else 0


@given(st.binary(max_size=100))
@examples(50)
def test_short_tensors_of_any_length(data: bytes) -> None:
    assert tile_hash(torch.tensor(list(data), dtype=torch.uint8)) == plain(data)


@pytest.mark.parametrize("count", [8191, 8192, 8193, 20_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_tensors(count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    expected = plain(tensor.view(torch.uint8).numpy().tobytes())
    assert tile_hash(tensor) == expected
    monkeypatch.setattr(module, "CHUNK_WORDS", module.TILE_WORDS)
    assert tile_hash(tensor) == expected, "it depends on how many words are hashed at a time"


def test_a_hash_depends_on_values_and_places_but_not_on_strides() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tile_hash(tensor.T) == tile_hash(tensor.T.contiguous()) != tile_hash(tensor)
    assert tile_hash(torch.arange(9, dtype=torch.uint8)[1:]) == tile_hash(torch.arange(1, 9, dtype=torch.uint8))


def test_one_flipped_bit_changes_the_hash() -> None:
    data = torch.zeros(40_000, dtype=torch.uint8)
    before = tile_hash(data)
    for place in (0, 32_767, 32_768, 39_999):
        changed = data.clone()
        changed[place] = 128
        assert tile_hash(changed) != before


def test_the_device_decides_the_algorithm() -> None:
    assert [algorithm_on(device) for device in ("cpu", "cuda", "cuda:3")] == ["sha256", "tiles", "tiles"]
    assert digest(torch.ones(3)).startswith("sha256:")
