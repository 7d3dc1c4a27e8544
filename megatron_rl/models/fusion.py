"""Builds Megatron tensors from full Hugging Face tensors and splits them over tensor-parallel ranks, and back.

G key/value groups, n = heads / G, D = head_dim, r = tensor-parallel rank:
  replicated  the same on every rank
  row         row-parallel layer: the columns of the matrix are split over ranks
  vocab       padded with rows of zeros (`padded_vocabulary`), then the rows are split over ranks
  qkv         [G, (n + 2) * D, ...]: n query heads, a key head and a value head per group; groups are split over ranks
  gate_up     rank r holds its rows of gate, followed by its rows of up
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
    """Returns this rank's Megatron tensor, built from full Hugging Face tensors."""
    first = tensors[0]
    match kind:
        case "replicated":
            return first
        case "row":
            return first.chunk(tp, dim=1)[rank]
        case "vocab":
            return _padded_vocabulary_shard(first, model.vocabulary, tp, rank)
        case "gate_up":
            return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
        case "qkv":
            by_group = torch.cat([tensor.unflatten(0, (model.kv_heads, -1)) for tensor in tensors], dim=1)
            return by_group.chunk(tp)[rank].flatten(0, 1)


def join(kind: Kind, shards: list[Tensor], model: Architecture, memory: Memory = fresh) -> Iterator[Tensor]:
    """Yields full Hugging Face tensors, one at a time, built from the Megatron tensors of all ranks. Inverts `split`.

    The results may be views of the shards. A tensor that has to be concatenated is allocated in `memory`.
    """
    match kind:
        case "replicated":
            yield shards[0]
        case "row":
            yield _cat(shards, memory, dim=1)
        case "vocab":
            yield _cat(shards, memory)[: model.vocabulary]  # removes the padding
        case "gate_up":
            for halves in zip(*(shard.chunk(2) for shard in shards), strict=True):
                yield _cat(halves, memory)
        case "qkv":
            query_rows, groups = model.heads // model.kv_heads * model.head_dim, model.kv_heads // len(shards)
            rows = (query_rows, model.head_dim, model.head_dim)
            for parts in zip(*(shard.unflatten(0, (groups, -1)).split(rows, dim=1) for shard in shards), strict=True):
                yield _cat(parts, memory).flatten(0, 1)


def _padded_vocabulary_shard(matrix: Tensor, vocabulary: int, tp: int, rank: int) -> Tensor:
    """Returns this rank's rows of an embedding or LM head [vocabulary, ...] after padding it with rows of zeros."""
    rows = padded_vocabulary(vocabulary, tp) // tp
    unpadded = matrix[rank * rows : (rank + 1) * rows]
    return torch.cat([unpadded, unpadded.new_zeros(rows - unpadded.shape[0], *unpadded.shape[1:])])


def _cat(parts: Sequence[Tensor], memory: Memory, dim: int = 0) -> Tensor:
    """Concatenates; a single contiguous part is returned without a copy."""
    first = parts[0]
    if len(parts) == 1 and first.is_contiguous():
        return first
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.cat(list(parts), dim=dim, out=memory(first, shape))
