"""Core attention for Megatron's local layers, built on `scaled_dot_product_attention`.

Supports grouped queries and packed sequences, on CPU and on CUDA without Transformer Engine. A ModuleSpec plugs this
attention into Megatron's layers.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_rl.actor.model.tree_attention import RunPacking, tree_packing
from megatron_rl.batching.prefix_tree import PrefixTree


class CoreAttention(torch.nn.Module):
    """Causal self-attention. Megatron builds and calls this module; unused arguments go to `settings`."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **settings: object
    ) -> None:
        super().__init__()
        if config.attention_dropout or config.context_parallel_size > 1:
            raise ValueError(f"{type(self).__name__} supports neither dropout nor context parallelism")
        self.scale = softmax_scale


class SDPAttention(CoreAttention):
    """Attention by `scaled_dot_product_attention`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **settings: object,
    ) -> Tensor:
        """Attends within each sequence. Raises ValueError if a mask is given.

        Packed: query [T, heads, dim], key and value [T, kv_heads, dim] -> [T, heads, dim]. Each sequence attends to
        itself only, or as a RunPacking specifies. Not packed: [length, batch, heads, dim] -> [length, batch,
        heads * dim].
        """
        if attention_mask is not None:
            raise ValueError("SDPAttention is causal and takes no mask; pack the sequences, or pad them on the right")
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        if not isinstance(packed_seq_params, RunPacking):
            lengths = packed_seq_params.cu_seqlens_q.diff().cpu().numpy()
            packed_seq_params = tree_packing(PrefixTree.separate(lengths), query.device)
        return packed_seq_params.attention(query, key, value, self._attend_rows)

    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attends within each row; all tensors are [rows, length, heads, dim]."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(query, key, value, mask).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends within each batch element; all tensors are [batch, heads, length, dim]."""
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
