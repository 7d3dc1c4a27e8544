"""How a Megatron tensor is made of whole Hugging Face tensors and shared out over tensor-parallel ranks, and back.

G key/value groups, n = heads / G, D = head_dim, r = tensor rank:
  replicated  the same on every rank
  row         a row-parallel layer: the matrix's columns over ranks
  vocab       its rows over ranks, after padding with rows of zeros
  qkv         [G, (n + 2) * D, ...]: of each group its n query heads, its key head, its value head; groups over ranks
  gate_up     rank r holds its rows of gate, then its rows of up
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import Kind
from megatron_rl.parallel.layout import padded_vocabulary
from megatron_rl.utils.memory import Memory, fresh


def split(kind: Kind, tensors: list[Tensor], model: Architecture, tp: int, rank: int) -> Tensor:
    """Whole Hugging Face tensors -> this rank's Megatron tensor."""
    first = tensors[0]
    match kind:
        case "replicated":
            return first
        case "row":
            return first.chunk(tp, dim=1)[rank]
        case "vocab":
            rows = padded_vocabulary(model.vocabulary, tp) // tp
            held = first[rank * rows : (rank + 1) * rows]
            return torch.cat([held, held.new_zeros(rows - held.shape[0], *held.shape[1:])])
        case "gate_up":
            return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
        case "qkv":
            by_group = torch.cat([tensor.unflatten(0, (model.kv_heads, -1)) for tensor in tensors], dim=1)
            return by_group.chunk(tp)[rank].flatten(0, 1)


def join(kind: Kind, shards: list[Tensor], model: Architecture, memory: Memory = fresh) -> Iterator[Tensor]:
    """Every rank's Megatron tensor -> whole Hugging Face tensors, one at a time; the inverse of `split`.

    They may be views of the shards; what has to be put together is in `memory`.
    """
    match kind:
        case "replicated":
            yield shards[0]
        case "row":
            yield _cat(shards, memory, dim=1)
        case "vocab":
            yield _cat(shards, memory)[: model.vocabulary]
        case "gate_up":
            for halves in zip(*(shard.chunk(2) for shard in shards), strict=True):
                yield _cat(halves, memory)
        case "qkv":
            query_rows, groups = model.heads // model.kv_heads * model.head_dim, model.kv_heads // len(shards)
            rows = (query_rows, model.head_dim, model.head_dim)
            for parts in zip(*(shard.unflatten(0, (groups, -1)).split(rows, dim=1) for shard in shards), strict=True):
                yield _cat(parts, memory).flatten(0, 1)


def _cat(parts: Sequence[Tensor], memory: Memory, dim: int = 0) -> Tensor:
    """Without a copy where there is one only, and without gaps."""
    first = parts[0]
    if len(parts) == 1 and first.is_contiguous():
        return first
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.cat(list(parts), dim=dim, out=memory(first, shape))
