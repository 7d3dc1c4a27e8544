"""Attention over sequences that share positions equals attention over each sequence alone, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.actor.model import tree_attention
from megatron_rl.actor.model.attention import SDPAttention
from megatron_rl.actor.model.tree_attention import tree_packing
from megatron_rl.batching.prefix_tree import PrefixTree

HEADS, KV_HEADS, DIM = 4, 2, 8
CPU = torch.device("cpu")
RUN_KEYS = st.sampled_from([1, 3, 8, tree_attention.MASKED_RUN_KEYS])
"""With small limits some sequences form a run by themselves, and sequences longer than the limit have no mask."""

rows_lists = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8)


def attention() -> SDPAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, attention_dropout=0.0)
    return SDPAttention(config, layer_number=1)


def inputs(size: int) -> list[torch.Tensor]:
    torch.manual_seed(size)
    return [torch.randn(size, heads, DIM, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def attend_separately(tree: PrefixTree, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Computes each position by the formula, from a sequence that contains it."""
    out = torch.zeros_like(query)
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    for path in tree.paths:
        for i, place in enumerate(path.tolist()):
            seen = torch.from_numpy(path[: i + 1])
            scores = torch.einsum("hd,khd->hk", query[place], key[seen]) / DIM**0.5
            out[place] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen])
    return out


@given(rows_lists, RUN_KEYS, st.integers(0, 5))
def test_a_sequence_attends_to_itself_only(rows: list[list[int]], run_keys: int, padding: int) -> None:
    tree = PrefixTree.of([np.array(row, dtype=np.int64) for row in rows])
    padding = max(padding, int(tree.size == 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "MASKED_RUN_KEYS", run_keys)
        packing = tree_packing(tree, CPU, padding)
    given = [x.requires_grad_() for x in inputs(tree.size + padding)]
    out = attention()(*given, None, packing)
    assert out.shape == given[0].shape and out.isfinite().all()
    expected = attend_separately(tree, *given)
    torch.testing.assert_close(out[: tree.size], expected[: tree.size])

    weight = torch.randn(tree.size, HEADS, DIM, dtype=torch.float64)
    found = torch.autograd.grad((out[: tree.size] * weight).sum(), given)
    wanted = torch.autograd.grad((expected[: tree.size] * weight).sum(), given) if tree.size else found
    for gradient, formula in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, formula)


def test_long_sequences_have_no_mask() -> None:
    """The size of a mask would grow with the square of the sequence length."""
    prompt, random = np.arange(100), np.random.default_rng(0)
    rows = [np.concatenate([prompt, random.integers(0, 50, length)]) for length in (400, 390, 3, 420, 5)]
    tree = PrefixTree.of(rows)
    assert tree.size < sum(map(len, rows)) - 4 * 99
    blocks = tree_packing(tree, CPU).blocks
    assert all(block.mask is None for block in blocks if block.keys.shape[1] > tree_attention.MASKED_RUN_KEYS)
    assert sum(block.mask is None for block in blocks) >= 2


def test_sequences_that_share_nothing_are_grouped_by_length() -> None:
    lengths = np.array([200, 7, 130, 300])
    blocks = tree_packing(PrefixTree.separate(lengths), CPU).blocks
    assert sorted(block.queries.shape for block in blocks) == [(1, 7), (1, 300), (2, 200)]
