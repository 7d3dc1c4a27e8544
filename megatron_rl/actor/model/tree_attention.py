"""Attention over sequences that share positions: computes once for all layers which queries attend to which keys.

Sequences with a common prefix attend from their own positions to all positions of their sequence. Several short
sequences form one run, with a mask for what each query sees. A longer sequence forms a run by itself, including the
queries that it shares with others: causal attention then needs no mask, which for long sequences would take far more
memory than everything else.
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

MASKED_RUN_KEYS = 48
"""Largest number of positions that the sequences of one masked run attend to together."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query [n, q, heads, dim], key and value [n, k, kv_heads, dim], mask) -> output [n, q, heads, dim]."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """n runs of sequences, of similar size."""

    queries: Tensor
    """[n, q], positions of the queries, followed by padding."""
    keys: Tensor
    """[n, k], positions that these queries attend to, followed by padding."""
    mask: Tensor | None
    """[n, 1, q, k] bool, true where a query sees a key. None: queries and keys are the same and attention is causal."""


@dataclass(eq=False)
class TreePacking(PackedSeqParams):
    """Appears to Megatron as one packed sequence, with rotary frequencies selected position by position."""


@dataclass(eq=False)
class RunPacking(TreePacking):
    """A tree as runs of sequences, for `SDPAttention`."""

    blocks: tuple[Block, ...] = ()
    places: Tensor | None = None
    """[s], index of each position among the queries of all blocks, including padding; one of the indices if a position
    occurs in several blocks."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Attends block by block: query [s, heads, dim], key and value [s, kv_heads, dim] -> [s, heads, dim]."""
        rows = [attend(query[b.queries], key[b.keys], value[b.keys], b.mask).flatten(0, 1) for b in self.blocks]
        return torch.cat(rows)[self.places]


def tree_packing(tree: PrefixTree, device: torch.device, padding: int = 0) -> RunPacking:
    """Returns the packing of a tree, followed by positions of padding that attend to padding only."""
    total = tree.size + padding
    bounds = torch.tensor([0, total], dtype=torch.int32, device=device)
    longest = max(int(tree.lengths.max(initial=0)), 1)
    ends = torch.from_numpy(tree.ends_with_padding(total)).to(device)
    tail = np.arange(tree.size, total)
    similar: dict[tuple[int, int, bool], list[tuple[Indices, Indices]]] = {}
    for queries, keys in [*_runs(tree), (tail, tail)]:
        causal = len(queries) == len(keys) > MASKED_RUN_KEYS
        if len(queries):
            similar.setdefault((len(queries).bit_length(), len(keys).bit_length(), causal), []).append((queries, keys))
    real = np.concatenate([_padded([queries for queries, _ in runs], -1).ravel() for runs in similar.values()])
    places = np.empty(total, dtype=np.int64)
    places[real[real >= 0]] = np.flatnonzero(real >= 0)
    return RunPacking(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        blocks=tuple(_block(runs, None if causal else ends, device) for (_, _, causal), runs in similar.items()),
        places=torch.from_numpy(places).to(device),
    )


def _runs(tree: PrefixTree) -> list[tuple[Indices, Indices]]:
    """Returns the queries and keys of each run."""
    found = []
    for run in tree.runs(MASKED_RUN_KEYS):
        first, last = run[0], run[-1]
        own = np.arange(tree.starts[first], tree.starts[last] + tree.own[last])
        seen = np.concatenate([tree.paths[first][: tree.shared[first]], own])
        if len(own):
            found.append((own if len(seen) <= MASKED_RUN_KEYS else seen, seen))
    return found


def _block(runs: Sequence[tuple[Indices, Indices]], ends: Tensor | None, device: torch.device) -> Block:
    """Builds a block from runs of similar size.

    ends: [s], for each position the end of the range of positions that see it; None: attention is causal in each run.
    """
    queries, keys = (torch.from_numpy(_padded(part, -1)).to(device) for part in zip(*runs, strict=True))
    # A padded query repeats the first of its run: a query that sees no key would yield NaN.
    queries = torch.where(queries < 0, queries[:, :1], queries)
    if ends is None:
        return Block(queries, queries, None)
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    return Block(queries, keys.clamp(min=0), (k >= 0) & (k <= q) & (q < ends[k]))


def _padded(rows: Sequence[Indices], padding: int) -> Indices:
    """Stacks rows into [n, longest], padded on the right."""
    table = np.full((len(rows), max(map(len, rows))), padding)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
