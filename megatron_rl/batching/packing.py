"""Packing of sequences into the tensors of one forward pass. Legend: b tensor rows, s positions, T sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_rl.batching.arrays import Indices
from megatron_rl.batching.context import chunk_multiple
from megatron_rl.batching.prefix_tree import PrefixTree
from megatron_rl.batching.sequences import SequenceBatch

PackingForm = Literal["prefix_tree", "packed", "padded"]

FLEX_BLOCK = 128
"""FlexAttention visits or skips this many queries and keys at a time."""


@dataclass(frozen=True, slots=True)
class PackingSpec:
    """How sequences become tensors."""

    rows: PackingForm = "packed"
    """prefix_tree: all sequences in one tensor row, with each shared prefix only once. packed: all sequences one after
    another in one tensor row, without padding between them. padded: a tensor row per sequence, padded on the right."""
    flex: bool = False
    """Whether FlexAttention attends over the prefix trees. s must then be a multiple of `FLEX_BLOCK`."""
    length_multiple: int = 1
    """s is padded to a multiple of this."""
    context_ranks: int = 1
    """Number of context-parallel ranks that share each sequence. Only the packed form can be shared."""
    context_rank: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class PackedInputs:
    """Sequences as the arrays of one forward pass. The last token of a sequence is only a target, so a sequence of n
    tokens takes n - 1 positions."""

    tokens: Indices
    """[b, s]; b is 1 unless padded."""
    positions: Indices
    """[b, s], position of each token in its own sequence."""
    predictors: Indices
    """[T], index into the flattened [s * b] of the position that predicts each sampled token."""
    bounds: Indices | None = None
    """Boundaries of packed sequences; the padding at the end counts as a sequence of its own."""
    tree: PrefixTree | None = None
    """The tree of the prefix_tree form; padding follows after it."""


def pack(batch: SequenceBatch, spec: PackingSpec, length: int = 0) -> PackedInputs:
    """Packs the batch; s is at least `length`. An empty batch becomes one position of padding."""
    return {"prefix_tree": _prefix_tree, "packed": _packed, "padded": _padded}[spec.rows](batch, spec, length)


def packed_length(batch: SequenceBatch, rows: Sequence[int], spec: PackingSpec) -> int:
    """Returns s of these sequences in one tensor row, over all context-parallel ranks."""
    unit = chunk_multiple(spec.context_ranks)
    if spec.rows == "prefix_tree":
        tokens = PrefixTree.of([batch.sequence(i) for i in rows]).size
    else:
        tokens = int(_rounded_up(batch.lengths[list(rows)] - 1, unit).sum())
    return int(_rounded_up(max(1, tokens), math.lcm(unit, spec.length_multiple)))


def _prefix_tree(batch: SequenceBatch, spec: PackingSpec, length: int) -> PackedInputs:
    sequences = batch.sequences
    tree = PrefixTree.of(sequences)
    s = max(length, int(_rounded_up(max(1, tree.size), spec.length_multiple)))
    tokens, positions = np.zeros((2, s), dtype=np.int64)
    predictors = np.split(batch.predictors, np.cumsum(batch.sampled_lengths)[:-1]) if len(batch) else []
    for row, path in zip(tree.order.tolist(), tree.paths, strict=True):
        tokens[path] = sequences[row][:-1]
        predictors[row] = path[predictors[row]]
    positions[: tree.size] = tree.depths
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *predictors])
    return PackedInputs(tokens[None], positions[None], joined, tree=tree)


def _packed(batch: SequenceBatch, spec: PackingSpec, length: int) -> PackedInputs:
    slots = _rounded_up(batch.lengths - 1, chunk_multiple(spec.context_ranks))
    tail = max(length, packed_length(batch, range(len(batch)), spec)) - int(slots.sum())
    if tail:
        slots = np.append(slots, tail)
    ends = np.cumsum(slots)
    starts = ends - slots
    tokens = np.zeros(int(ends[-1]), dtype=np.int64)
    for sequence, start in zip(batch.sequences, starts[: len(batch)].tolist(), strict=True):
        tokens[start : start + len(sequence) - 1] = sequence[:-1]
    positions = np.arange(len(tokens)) - np.repeat(starts, slots)
    predictors = batch.predictors + batch.per_token(starts[: len(batch)])
    bounds = np.concatenate([[0], ends])
    return PackedInputs(tokens[None], positions[None], predictors, bounds=bounds)


def _padded(batch: SequenceBatch, spec: PackingSpec, length: int) -> PackedInputs:
    longest = int(batch.lengths.max(initial=0)) - 1
    width = max(length, _rounded_up(max(1, longest), spec.length_multiple))
    tokens = np.zeros((max(1, len(batch)), width), dtype=np.int64)
    for i, sequence in enumerate(batch.sequences):
        tokens[i, : len(sequence) - 1] = sequence[:-1]
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    predictors = batch.predictors * len(tokens) + batch.per_token(np.arange(len(batch)))
    return PackedInputs(tokens, positions, predictors)


def _rounded_up(number: Any, multiple: int) -> Any:
    return -(-number // multiple) * multiple
