"""How rows lie in the tensors of one forward pass. Legend: b rows, s positions, T response tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_rl.batching.context import Indices, chunk_multiple
from megatron_rl.batching.prefix_tree import PrefixTree
from megatron_rl.batching.sequences import SequenceBatch

PackingForm = Literal["prefix_tree", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class PackingSpec:
    """How rows become tensors."""

    rows: PackingForm = "packed"
    """prefix_tree: in a single row, with what several have in common from their start once; packed: one after another
    in a single row without padding between them; padded: side by side, padded on the right."""
    length_multiple: int = 1
    """s is padded to a multiple of this."""
    context_ranks: int = 1
    """Ranks that share each row; only packed ones can be shared."""
    context_rank: int = 0


@dataclass(frozen=True, slots=True)
class PackedInputs:
    tokens: Indices
    """[b, s]; in a single row: [1, s]."""
    positions: Indices
    """[b, s]"""
    predictors: Indices
    """[T], where in the flattened [s * b] the response tokens are predicted."""
    bounds: Indices | None = None
    """Of packed rows; padding at the end is a row of its own."""
    tree: PrefixTree | None = None
    """Padding comes after it."""


def pack(part: SequenceBatch, form: PackingSpec, length: int = 0) -> PackedInputs:
    """s is at least `length`. Of no rows at all there is a position of padding."""
    return {"prefix_tree": _tree, "packed": _packed, "padded": _padded}[form.rows](part, form, length)


def packed_length(batch: SequenceBatch, rows: Sequence[int], form: PackingSpec) -> int:
    """s of these rows in a single row, over all context-parallel ranks."""
    unit = chunk_multiple(form.context_ranks)
    if form.rows == "prefix_tree":
        tokens = PrefixTree.of([batch.tokens[i] for i in rows]).size
    else:
        tokens = int(_rounded_up(batch.lengths[list(rows)] - 1, unit).sum())
    return int(_rounded_up(max(1, tokens), math.lcm(unit, form.length_multiple)))


def _tree(part: SequenceBatch, form: PackingSpec, length: int) -> PackedInputs:
    tree = PrefixTree.of(part.tokens)
    s = max(length, int(_rounded_up(max(1, tree.size), form.length_multiple)))
    tokens, positions = np.zeros((2, s), dtype=np.int64)
    places: list[Indices] = [np.zeros(0, dtype=np.int64)] * len(part)
    for row, path in zip(tree.order, tree.paths, strict=True):
        tokens[path] = part.tokens[row][:-1]
        places[row] = path[part.prompt_lengths[row] - 1 :]
    positions[: tree.size] = tree.depths
    predictors = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    return PackedInputs(tokens[None], positions[None], predictors, tree=tree)


def _packed(part: SequenceBatch, form: PackingSpec, length: int) -> PackedInputs:
    slots = _rounded_up(part.lengths - 1, chunk_multiple(form.context_ranks))
    tail = max(length, packed_length(part, range(len(part)), form)) - int(slots.sum())
    if tail:
        slots = np.append(slots, tail)
    ends = np.cumsum(slots)
    starts = ends - slots
    tokens = np.zeros(int(ends[-1]), dtype=np.int64)
    for row, start in zip(part.tokens, starts[: len(part)], strict=True):
        tokens[start : start + len(row) - 1] = row[:-1]
    positions = np.arange(len(tokens)) - np.repeat(starts, slots)
    predictors = _predicting(part) + part.per_token(starts[: len(part)])
    bounds = np.concatenate([[0], ends])
    return PackedInputs(tokens[None], positions[None], predictors, bounds=bounds)


def _padded(part: SequenceBatch, form: PackingSpec, length: int) -> PackedInputs:
    longest = int(part.lengths.max() - 1) if len(part) else 1
    width = max(length, _rounded_up(longest, form.length_multiple))
    tokens = np.zeros((max(1, len(part)), width), dtype=np.int64)
    for i, row in enumerate(part.tokens):
        tokens[i, : len(row) - 1] = row[:-1]
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    predictors = _predicting(part) * len(tokens) + part.per_token(np.arange(len(part)))
    return PackedInputs(tokens, positions, predictors)


def _predicting(part: SequenceBatch) -> Indices:
    """[T], the position in its row that predicts each response token."""
    first = np.cumsum(part.response_lengths) - part.response_lengths
    return np.arange(part.num_response_tokens) + part.per_token(part.prompt_lengths - 1 - first)


def _rounded_up(number: Any, multiple: int) -> Any:
    return -(-number // multiple) * multiple
