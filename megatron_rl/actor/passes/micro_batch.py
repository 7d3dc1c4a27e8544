"""Rows as the tensors of one forward pass. Legend: b rows, s positions, T response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lpreg import ProxyStore
from megatron_rl.actor.model.tree_attention import tree_packing
from megatron_rl.batching.context import Indices, held_by
from megatron_rl.batching.packing import PackingSpec, pack
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The last token of a row is only a target, so a row takes its length less one. Of no rows at all there is a
    position of padding, so that a rank can take part in a forward that the others need."""

    tokens: Tensor
    """[b, s]; in a single row: [1, s]. Under context parallelism this rank's part of s."""
    positions: Tensor
    """[b, s]"""
    packing: PackedSeqParams | None
    """Who sees whom: where packed rows begin and end, or a TreePacking; None for padded rows."""
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


def micro_batch(
    batch: SequenceBatch, rows: Sequence[int], device: torch.device, form: PackingSpec, length: int = 0
) -> MicroBatch:
    """The given rows of the batch, on the device; s is at least `length`."""
    part = batch.take(rows)
    laid = pack(part, form, length)
    tokens, positions, predictors = laid.tokens, laid.positions, laid.predictors

    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device)

    places = packing = None
    if laid.tree is not None:
        packing = tree_packing(laid.tree, device, tokens.shape[1] - laid.tree.size)
    elif laid.bounds is not None:
        packing = _packing(tensor(laid.bounds.astype(np.int32)), form.context_ranks > 1)
    if form.context_ranks > 1:
        assert laid.bounds is not None, "only packed rows can be shared"
        held = held_by(form.context_rank, form.context_ranks, np.diff(laid.bounds).tolist())
        tokens, positions, predictors, mine = _held_part(tokens, positions, predictors, held)
        places = tensor(mine)
    return MicroBatch(
        tokens=tensor(tokens),
        positions=tensor(positions),
        packing=packing,
        predictors=tensor(predictors),
        places=places,
        targets=tensor(part.targets),
        sequence_ids=tensor(part.per_token(np.asarray(rows, dtype=np.int64))),
        values={name: tensor(value) for name, value in part.values.items()},
        rows=tuple(rows),
        proxy=None if part.proxy is None else _proxy_store(part.proxy, device),
    )


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


def _proxy_store(proxy: StoredProxy, device: torch.device) -> ProxyStore:
    counts = torch.tensor(proxy.counts, device=device)
    ids = torch.tensor(proxy.ids, device=device, dtype=torch.int64)
    return ProxyStore(counts > 0, counts, ids, torch.tensor(proxy.log_q, device=device))
