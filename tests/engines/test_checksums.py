"""Checksums against the servers' own code: what each rank holds, and how SGLang hashes on a GPU."""

from __future__ import annotations

import pytest

from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.digest import tile_hash
from tests.engines import their_hash
from tests.engines.conftest import KINDS, printed
from tests.engines.their_layouts import CASES, SHAPES, weights


@pytest.mark.sglang
def test_the_tile_hash_is_that_of_sglangs_kernels() -> None:
    theirs = printed("hashes:", "tests.engines.their_hash")
    assert theirs == {name: tile_hash(tensor) for name, tensor in their_hash.tensors()}
    assert len(set(theirs.values())) == len(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_are_those_of_what_each_rank_of_a_server_holds(kind: str) -> None:
    """All families and sizes at 1 to 8 ranks. A server refuses ranks that do not divide the heads."""
    theirs = printed("digests:", "tests.engines.their_layouts", kind)
    refused = {case for case, digests in theirs.items() if digests is None}
    uneven = {f"{name}, {ranks}" for name, ranks in CASES if SHAPES[name].heads % ranks}
    assert refused == uneven | ({"a small model, 3"} if kind == "vllm" else set())
    for name, ranks in CASES:
        if (digests := theirs[f"{name}, {ranks}"]) is not None:
            taker = ChecksumTaker(ranks, SHAPES[name].kv_heads)
            for tensor_name, tensor in weights(SHAPES[name]):
                taker.add(tensor_name, tensor)
            assert taker.result().fused == digests, (name, ranks)
