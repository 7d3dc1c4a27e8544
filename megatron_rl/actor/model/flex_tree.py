"""Attention over a prefix tree by torch's FlexAttention, for GPUs, beside Transformer Engine's linear layers and norms.

One number per position describes the tree: where the range of positions that see it ends (`PrefixTree.ends`). The mask
and the blocks that FlexAttention visits follow from it on the device, so the host waits for nothing. Never run on a
GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_rl.actor.model.attention import CoreAttention
from megatron_rl.actor.model.tree_attention import TreePacking
from megatron_rl.batching.packing import FLEX_BLOCK


@dataclass(eq=False)
class FlexPacking(TreePacking):
    """A tree as a mask of FlexAttention, for `FlexTreeAttention`."""

    mask: BlockMask | None = None


def flex_packing(bounds: Tensor, ends: Tensor, longest: int) -> FlexPacking:
    """Returns the packing of a tree and its padding.

    bounds: [2] int32, 0 and s. ends: [s] int32, for each position the end of the range of positions that see it; s is a
    multiple of `FLEX_BLOCK`. longest: number of positions of the longest sequence.
    """
    return FlexPacking(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        mask=block_mask(ends),
    )


def block_mask(ends: Tensor) -> BlockMask:
    """Returns the mask by which position q sees key k if k <= q < ends[k].

    The positions that see some key of a block are contiguous, since each key sees itself: from the block's first key
    to the largest end. The positions that see all its keys lie behind its last key and before the smallest end.
    """
    blocks = len(ends) // FLEX_BLOCK
    low, high = torch.aminmax(ends.view(blocks, FLEX_BLOCK), dim=1)
    keys = torch.arange(0, len(ends), FLEX_BLOCK, device=ends.device)
    queries = keys[:, None]
    visited = (keys <= queries) & (queries < high)
    full = (keys < queries) & (queries + FLEX_BLOCK <= low)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    return BlockMask.from_kv_blocks(*_listed(visited & ~full), *_listed(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many columns of each row are chosen, and the columns with these first, with two dimensions before."""
    counts = chosen.sum(dim=-1, dtype=torch.int32)
    columns = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], columns.to(torch.int32)[None, None]


@cache
def kernel() -> Callable[..., Any]:
    """Returns FlexAttention compiled for all lengths. Uncompiled, it would hold the scores of all pairs in memory."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


class FlexTreeAttention(CoreAttention):
    """Attention in a prefix tree by FlexAttention."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **settings: object,
    ) -> Tensor:
        """Attends as a FlexPacking specifies: query [s, heads, dim], key and value [s, kv_heads, dim] ->
        [s, heads, dim]. Raises TypeError without a FlexPacking."""
        if not isinstance(packed_seq_params, FlexPacking):
            raise TypeError("FlexTreeAttention takes prefix trees only, packed as a FlexPacking")
        query, key, value = (x[None].transpose(1, 2) for x in (query, key, value))
        out: Tensor = kernel()(query, key, value, block_mask=packed_seq_params.mask, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2)[0]
