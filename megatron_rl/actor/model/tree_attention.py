"""Attention over rows that share positions: which queries look at which keys, worked out once for all layers.

Rows that begin alike look from their own positions at all of their row. A few short ones go together, with a mask for
who sees what. A longer one goes alone and whole, the queries that it shares included: causal attention then needs no
mask, which for long rows would be much larger than all else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.batching.arrays import Indices
from megatron_rl.batching.prefix_tree import PrefixTree

TOGETHER = 48
"""Positions that rows which go together see at most."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query [n, q, heads, dim], key and value [n, k, kv_heads, dim], mask) -> [n, q, heads, dim]."""


@dataclass(frozen=True, slots=True)
class Block:
    """n runs of rows, of similar size."""

    queries: Tensor
    """[n, q], positions, then padding."""
    keys: Tensor
    """[n, k], what those see, then padding."""
    mask: Tensor | None
    """[n, 1, q, k] bool, true where a query sees a key. None: queries are keys, and each sees those up to itself."""


@dataclass
class TreePacking(PackedSeqParams):
    """To Megatron, one packed sequence, whose rotary frequencies come position by position."""

    blocks: tuple[Block, ...] = ()
    places: Tensor | None = None
    """[s], where each position is among the queries of all blocks, padding included; one of them, where it is in
    several."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """query: [s, heads, dim], key and value: [s, kv_heads, dim] -> [s, heads, dim]."""
        rows = [attend(query[b.queries], key[b.keys], value[b.keys], b.mask).flatten(0, 1) for b in self.blocks]
        return torch.cat(rows)[self.places]


def tree_packing(tree: PrefixTree, device: torch.device, padding: int = 0) -> TreePacking:
    """Of a tree, with so many positions of padding after it that look at nothing else."""
    total = tree.size + padding
    bounds = torch.tensor([0, total], dtype=torch.int32, device=device)
    longest = max(int(tree.lengths.max(initial=0)), 1)
    ends = torch.from_numpy(np.append(tree.ends, np.full(padding, total))).to(device)
    tail = np.arange(tree.size, total)
    alike: dict[tuple[int, int, bool], list[tuple[Indices, Indices]]] = {}
    for queries, keys in [*_runs(tree), (tail, tail)]:
        whole = len(queries) == len(keys) > TOGETHER
        if len(queries):
            alike.setdefault((len(queries).bit_length(), len(keys).bit_length(), whole), []).append((queries, keys))
    real = np.concatenate([_padded([queries for queries, _ in runs], -1).ravel() for runs in alike.values()])
    places = np.empty(total, dtype=np.int64)
    places[real[real >= 0]] = np.flatnonzero(real >= 0)
    return TreePacking(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        blocks=tuple(_block(runs, None if whole else ends, device) for (_, _, whole), runs in alike.items()),
        places=torch.from_numpy(places).to(device),
    )


def _runs(tree: PrefixTree) -> list[tuple[Indices, Indices]]:
    """(queries, keys) of each."""
    found = []
    for run in tree.runs(TOGETHER):
        first, last = run[0], run[-1]
        own = np.arange(tree.starts[first], tree.starts[last] + tree.own[last])
        seen = np.concatenate([tree.paths[first][: tree.shared[first]], own])
        if len(own):
            found.append((own if len(seen) <= TOGETHER else seen, seen))
    return found


def _block(runs: Sequence[tuple[Indices, Indices]], ends: Tensor | None, device: torch.device) -> Block:
    """ends: [s], where the positions end that see each; None: each is seen by those after it in its run."""
    queries, keys = (torch.from_numpy(_padded(part, -1)).to(device) for part in zip(*runs, strict=True))
    # A padded query repeats its run's first, as it must see something, lest it be NaN.
    queries = torch.where(queries < 0, queries[:, :1], queries)
    if ends is None:
        return Block(queries, queries, None)
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    return Block(queries, keys.clamp(min=0), (k >= 0) & (k <= q) & (q < ends[k]))


def _padded(rows: Sequence[Indices], padding: int) -> Indices:
    """[n, longest]"""
    table = np.full((len(rows), max(map(len, rows))), padding)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
