"""FlexAttention over a prefix tree equals attention over each sequence alone, as far as a CPU can show it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megatron_rl.actor.model import flex_tree
from megatron_rl.actor.model.attention import SDPAttention
from megatron_rl.actor.model.flex_tree import FlexPacking, FlexTreeAttention, block_mask, flex_packing
from megatron_rl.actor.model.tree_attention import tree_packing
from megatron_rl.batching.packing import FLEX_BLOCK
from megatron_rl.batching.prefix_tree import PrefixTree
from tests import flex_reference

HEADS, KV_HEADS, DIM = 10, 2, 16
"""Five query heads share a key, as in models of 14B and 32B."""
CPU = torch.device("cpu")

lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=6)
"""Pairs of the length of a sequence and how much of it is the same in all sequences."""


def config(**changes: Any) -> TransformerConfig:
    shape = dict(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, attention_dropout=0.0)
    return TransformerConfig(**(shape | changes))


def tree_of(pairs: list[tuple[int, int]], seed: int = 0) -> PrefixTree:
    random = np.random.default_rng(seed)
    common = random.integers(0, 5, 301)
    rows = [random.integers(0, 5, length + 1) for length, _ in pairs]
    for row, (_, shared) in zip(rows, pairs, strict=True):
        row[:shared] = common[: len(row)][:shared]
    return PrefixTree.of(rows)


def packing_of(tree: PrefixTree, extra_blocks: int = 0) -> tuple[FlexPacking, int]:
    size = (-(-max(1, tree.size) // FLEX_BLOCK) + extra_blocks) * FLEX_BLOCK
    ends = torch.from_numpy(tree.ends_with_padding(size).astype(np.int32))
    return flex_packing(torch.tensor([0, size], dtype=torch.int32), ends, int(tree.lengths.max())), size


def tensors(size: int) -> list[Tensor]:
    torch.manual_seed(size)
    return [torch.randn(size, n, DIM, dtype=torch.float64).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS)]


@given(lengths, st.integers(0, 1))
@settings(max_examples=30)
def test_a_query_sees_its_own_sequence_only_and_no_block_without_need(pairs: list[tuple[int, int]], extra: int) -> None:
    tree = tree_of(pairs)
    packing, size = packing_of(tree, extra)
    assert packing.mask is not None
    wanted = torch.zeros(size, size, dtype=torch.bool)
    for path in tree.paths:
        places = torch.from_numpy(path)
        wanted[places[:, None], places[None, :]] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
    padding = slice(tree.size, size)
    wanted[padding, padding] = torch.ones(size - tree.size, size - tree.size, dtype=torch.bool).tril()
    for backward in (False, True):
        assert torch.equal(flex_reference.seen(packing.mask, backward), wanted)
    blocks = wanted.view(size // FLEX_BLOCK, FLEX_BLOCK, -1, FLEX_BLOCK)
    assert packing.mask.full_kv_num_blocks is not None
    assert packing.mask.full_kv_num_blocks.sum() == blocks.all(3).all(1).sum()
    assert packing.mask.kv_num_blocks.sum() + packing.mask.full_kv_num_blocks.sum() == blocks.any(3).any(1).sum()


@given(lengths)
@settings(max_examples=15)
def test_outputs_and_gradients_are_those_of_the_local_attention(pairs: list[tuple[int, int]]) -> None:
    tree = tree_of(pairs)
    packing, size = packing_of(tree)
    given = tensors(size)
    local = SDPAttention(config(), 1, softmax_scale=0.3)
    expected = local(*given, None, tree_packing(tree, CPU, size - tree.size))[: tree.size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_tree, "kernel", lambda: flex_reference.attend)
        found = FlexTreeAttention(config(), 1, softmax_scale=0.3)(*given, None, packing)
    assert found.shape == (size, HEADS, DIM) and found.isfinite().all()
    torch.testing.assert_close(found[: tree.size], expected)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((out * weight).sum(), given) for out in (found[: tree.size], expected))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_torch_has_the_same_forward_pass() -> None:
    """Torch computes it on a CPU without the blocks; its backward pass is for GPUs only."""
    packing, size = packing_of(tree_of([(200, 90), (150, 90), (40, 40)]))
    query, key, value = (x.detach()[None].transpose(1, 2) for x in tensors(size))
    arguments: dict[str, Any] = dict(block_mask=packing.mask, scale=0.3, enable_gqa=True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        found = flex_attention(query, key, value, **arguments)
    torch.testing.assert_close(found, flex_reference.attend(query, key, value, **arguments))


def test_one_compilation_serves_all_lengths_and_trees() -> None:
    """Torch's tracing is the real one here; what it hands on to the compiler runs as it is."""
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)
    for blocks in (3, 5, 9, 6, 7):
        ends = torch.full((blocks * FLEX_BLOCK,), blocks * FLEX_BLOCK, dtype=torch.int32)
        ends[10:20] = 20 + blocks
        query, key, value = (x.detach().float()[None].transpose(1, 2) for x in tensors(len(ends)))
        found = call(query, key, value, block_mask=block_mask(ends), scale=0.3, enable_gqa=True)
        expected = flex_reference.attend(query, key, value, block_mask=block_mask(ends), scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found, expected)
    assert len(compiled) == 1


def test_what_it_does_not_support_is_refused() -> None:
    with pytest.raises(ValueError, match="neither dropout nor context parallelism"):
        FlexTreeAttention(config(attention_dropout=0.1), 1)
    with pytest.raises(TypeError, match="prefix trees only"):
        FlexTreeAttention(config(), 1)(*tensors(FLEX_BLOCK), None, PackedSeqParams())
