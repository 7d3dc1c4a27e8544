"""FlexAttention in plain arithmetic, forward and backward on any device: what stands in for the compiled kernel.

Torch's own FlexAttention has no backward pass on a CPU, and reads only the mask's function there. This one reads the
blocks as the kernel does, so a block that is wrongly listed, or wrongly called full, changes the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Takes what `flex_attention` takes: query [1, heads, s, dim], key and value [1, kv_heads, s, dim]."""
    mask = seen(block_mask)
    assert torch.equal(mask, seen(block_mask, backward=True)), "the two passes see different keys"
    assert query.shape[2] == len(mask) and block_mask.seq_lengths == tuple(mask.shape)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


def seen(block_mask: BlockMask, backward: bool = False) -> Tensor:
    """Returns [s, s] bool: which query sees which key, by the blocks of the forward or of the backward pass."""
    b = block_mask
    assert b.full_kv_num_blocks is not None and b.full_kv_indices is not None
    if backward:
        assert b.q_num_blocks is not None and b.q_indices is not None
        assert b.full_q_num_blocks is not None and b.full_q_indices is not None
        partial = _table(b.q_num_blocks, b.q_indices).T
        full = _table(b.full_q_num_blocks, b.full_q_indices).T
    else:
        partial = _table(b.kv_num_blocks, b.kv_indices)
        full = _table(b.full_kv_num_blocks, b.full_kv_indices)
    partial, full = (
        table.repeat_interleave(b.BLOCK_SIZE[0], 0).repeat_interleave(b.BLOCK_SIZE[1], 1) for table in (partial, full)
    )
    places = torch.arange(len(full), device=full.device)
    none = places.new_zeros(())
    return full | (partial & b.mask_mod(none, none, places[:, None], places[None, :]))


def _table(counts: Tensor, columns: Tensor) -> Tensor:
    """Returns the listed blocks as [rows, columns] bool."""
    listed = torch.arange(columns.shape[-1], device=columns.device) < counts[0, 0][:, None]
    return torch.zeros_like(listed).scatter(1, columns[0, 0].long(), listed)
