"""Core attention on `scaled_dot_product_attention`: grouped queries, packed sequences; CPU, or CUDA without
Transformer Engine. Plugs into Megatron's local layers through their ModuleSpec."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SDPAttention(torch.nn.Module):
    """Causal self-attention. Megatron builds it and calls it; `settings` are what it passes that has no use here."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **settings: object
    ) -> None:
        super().__init__()
        if config.attention_dropout or config.context_parallel_size > 1:
            raise ValueError("SDPAttention has neither dropout nor context parallelism")
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **settings: object,
    ) -> Tensor:
        """Packed: query [T, heads, dim], key and value [T, kv_heads, dim] -> [T, heads, dim], each sequence on its own.
        Otherwise: [length, batch, heads, dim] -> [length, batch, heads * dim]. Raises ValueError for a mask."""
        if attention_mask is not None:
            raise ValueError("SDPAttention is causal and takes no mask; pack the sequences, or pad them on the right")
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        out = torch.empty_like(query)
        for places, inside in _alike(bounds, query.device):
            rows = self._attend(*(x[places].transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
            out[places[inside]] = rows[inside]
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, length, dim] each."""
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)


def _alike(bounds: list[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed sequences of similar length together, as (places [n, longest], which of them are real [n, longest]): one
    call for many short ones, and at most half of each row padding, which comes last and so is seen by nothing real."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(bounds):
        if stop > start:
            groups.setdefault((stop - start).bit_length(), []).append((start, stop - start))
    for group in groups.values():
        starts, lengths = torch.tensor(group, device=device).unbind(1)
        offsets = torch.arange(int(lengths.max()), device=device)
        inside = offsets < lengths[:, None]
        yield torch.where(inside, starts[:, None] + offsets, starts[:, None]), inside
