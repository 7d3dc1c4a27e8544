"""Rows as the tensors of one forward pass. Legend: b rows, s positions, T response tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lpreg import ProxyStore
from megatron_rl.batching.context import Indices, chunk_multiple, held_by
from megatron_rl.batching.rows import Rows
from megatron_rl.batching.stored_proxy import StoredProxy


@dataclass(frozen=True, slots=True)
class Form:
    """How rows become tensors."""

    packed: bool = True
    """One after another in a single row without padding between them; else side by side, padded on the right."""
    length_multiple: int = 1
    """s is padded to a multiple of this."""
    context_ranks: int = 1
    """Ranks that share each row; only packed ones can be shared."""
    context_rank: int = 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The last token of a row is only a target, so a row takes its length less one. Of no rows at all there is a
    position of padding, so that a rank can take part in a forward that the others need."""

    tokens: Tensor
    """[b, s]; packed: [1, s]. Under context parallelism this rank's part of s."""
    positions: Tensor
    """[b, s]"""
    packing: PackedSeqParams | None
    """Where packed rows begin and end; None for padded ones."""
    predictors: Tensor
    """[T], where in the flattened [s * b] the hidden state is that predicts each response token. Under context
    parallelism only of those tokens that this rank predicts: `places`."""
    places: Tensor | None
    """Which of the T tokens this rank predicts, ascending; None: all."""
    targets: Tensor
    """[T]"""
    sequence_ids: Tensor
    """[T], the row of each response token, counted over the whole batch."""
    values: dict[str, Tensor]
    """Name -> [T]."""
    rows: tuple[int, ...]
    """Which rows of the batch these are."""
    proxy: ProxyStore | None = None
    """Another policy's, over the T tokens, if the rows bring one."""


def micro_batch(batch: Rows, rows: Sequence[int], device: torch.device, form: Form, length: int = 0) -> MicroBatch:
    """The given rows of the batch, on the device; s is at least `length`."""
    part = batch.take(rows)
    tokens, positions, predictors, bounds = (_packed if form.packed else _padded)(part, form, length)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device)

    places = None
    if form.context_ranks > 1:
        held = held_by(form.context_rank, form.context_ranks, np.diff(bounds).tolist())
        tokens, positions, predictors, mine = _held_part(tokens, positions, predictors, held)
        places = tensor(mine)
    return MicroBatch(
        tokens=tensor(tokens),
        positions=tensor(positions),
        packing=_packing(tensor(bounds), form.context_ranks > 1) if form.packed else None,
        predictors=tensor(predictors),
        places=places,
        targets=tensor(part.targets),
        sequence_ids=tensor(part.per_token(np.asarray(rows, dtype=np.int64))),
        values={name: tensor(value) for name, value in part.values.items()},
        rows=tuple(rows),
        proxy=None if part.proxy is None else _proxy_store(part.proxy, device),
    )


def packed_length(batch: Rows, rows: Sequence[int], form: Form) -> int:
    """s of these rows packed, over all context-parallel ranks."""
    unit = chunk_multiple(form.context_ranks)
    tokens = int(_rounded_up(batch.lengths[list(rows)] - 1, unit).sum())
    return int(_rounded_up(max(1, tokens), math.lcm(unit, form.length_multiple)))


def _packed(part: Rows, form: Form, length: int) -> tuple[Indices, Indices, Indices, Indices]:
    """(tokens [1, s], positions [1, s], predictors [T], bounds of the rows). Padding at the end is a row of its own."""
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
    return tokens[None], positions[None], predictors, np.concatenate([[0], ends]).astype(np.int32)


def _padded(part: Rows, form: Form, length: int) -> tuple[Indices, Indices, Indices, Indices]:
    """(tokens [b, s], positions [b, s], predictors [T], nothing)."""
    longest = int(part.lengths.max() - 1) if len(part) else 1
    width = max(length, _rounded_up(longest, form.length_multiple))
    tokens = np.zeros((max(1, len(part)), width), dtype=np.int64)
    for i, row in enumerate(part.tokens):
        tokens[i, : len(row) - 1] = row[:-1]
    positions = np.broadcast_to(np.arange(width), tokens.shape)
    predictors = _predicting(part) * len(tokens) + part.per_token(np.arange(len(part)))
    return tokens, positions, predictors, np.zeros(0, dtype=np.int32)


def _predicting(part: Rows) -> Indices:
    """[T], the position in its row that predicts each response token."""
    first = np.cumsum(part.response_lengths) - part.response_lengths
    return np.arange(part.num_response_tokens) + part.per_token(part.prompt_lengths - 1 - first)


def _held_part(
    tokens: Indices, positions: Indices, predictors: Indices, held: Indices
) -> tuple[Indices, Indices, Indices, Indices]:
    """Of packed rows, what is at the positions `held`; and which response tokens that predicts."""
    place = np.full(tokens.shape[1], -1)
    place[held] = np.arange(len(held))
    local = place[predictors]
    return tokens[:, held], positions[:, held], local[local >= 0], np.flatnonzero(local >= 0)


def _packing(bounds: Tensor, shared: bool) -> PackedSeqParams:
    """`shared`: rows are cut for context parallelism, whose padding is then part of them."""
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds if shared else None,
        cu_seqlens_kv_padded=bounds if shared else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _rounded_up(number: Any, multiple: int) -> Any:
    return -(-number // multiple) * multiple


def _proxy_store(proxy: StoredProxy, device: torch.device) -> ProxyStore:
    counts = torch.tensor(proxy.counts, device=device)
    ids = torch.tensor(proxy.ids, device=device, dtype=torch.int64)
    return ProxyStore(counts > 0, counts, ids, torch.tensor(proxy.log_q, device=device))
