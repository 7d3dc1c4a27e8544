"""Sequences as the tensors of one forward pass. Legend: b rows, s positions, T sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lpreg import ProxyStore
from megatron_rl.actor.model.tree_attention import tree_packing
from megatron_rl.actor.passes.copies import to_device
from megatron_rl.batching.arrays import Indices
from megatron_rl.batching.context import held_by
from megatron_rl.batching.packing import PackingSpec, pack
from megatron_rl.batching.sequences import SequenceBatch

MARKS = ("wanted", "proxy_wanted")
"""Values [T] of a batch that mark the tokens that a pass is about; a batch has at most one of them."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The tensors of one forward pass.

    A micro-batch without sequences has one position of padding, so that its rank can take part in a forward pass that
    other ranks need.
    """

    tokens: Tensor
    """[b, s]; b is 1 unless padded. Under context parallelism s covers this rank's part only."""
    positions: Tensor
    """[b, s]"""
    packing: PackedSeqParams | None
    """Attention pattern: the boundaries of packed sequences, or a TreePacking. None for padded sequences."""
    predictors: Tensor
    """[T], index into the flattened [s * b] of the hidden state that predicts each sampled token. Under context
    parallelism it covers only the tokens in `places`."""
    places: Tensor | None
    """Which of the T tokens this rank predicts, in ascending order. None means all of them."""
    targets: Tensor
    """[T], the sampled tokens."""
    sequence_ids: Tensor
    """[T], index in the whole batch of the sequence that each sampled token belongs to."""
    values: dict[str, Tensor]
    """Name -> [T], except MARKS."""
    marked: Tensor | None
    """Which of the tokens that this rank predicts the batch marks by one of MARKS, in ascending order. An index has a
    size that the host knows, unlike a mask. None if the batch has no mark."""
    marked_places: Indices | None
    """The same tokens, counted among the T, on the host."""
    rows: tuple[int, ...]
    """Indices in the batch of these sequences."""
    proxy: ProxyStore | None = None
    """Sparse proxy distribution of another policy for the T tokens (those in `places` under context parallelism), if
    the batch has one."""

    @property
    def marked_targets(self) -> Tensor:
        """[R], the sampled tokens that are marked."""
        assert self.marked is not None
        targets = self.targets if self.places is None else self.targets[self.places]
        return targets[self.marked]


def micro_batch(
    batch: SequenceBatch, rows: Sequence[int], device: torch.device, spec: PackingSpec, length: int = 0
) -> MicroBatch:
    """Packs the given sequences of the batch on the device; s is at least `length`."""
    part = batch.take(rows)
    packed = pack(part, spec, length)
    tokens, positions, predictors, proxy = packed.tokens, packed.positions, packed.predictors, part.proxy
    arrays: dict[str, np.ndarray] = {}
    if spec.context_ranks > 1:
        assert packed.bounds is not None, "only packed sequences can be shared"
        held = held_by(spec.context_rank, spec.context_ranks, np.diff(packed.bounds).tolist())
        tokens, positions, predictors, places = _held_part(tokens, positions, predictors, held)
        arrays["places"] = places
        proxy = None if proxy is None else proxy.take(places)
    values = {name: value for name, value in part.values.items() if name not in MARKS}
    marked_places = None
    for mark in part.values.keys() & set(MARKS):
        predicted = arrays.get("places", np.arange(len(part.targets)))
        arrays["marked"] = np.flatnonzero(part.values[mark][predicted])
        marked_places = predicted[arrays["marked"]]
    s = tokens.shape[1]
    if spec.flex and packed.tree is not None:
        arrays |= {"bounds": np.array([0, s], np.int32), "ends": packed.tree.ends_with_padding(s).astype(np.int32)}
    elif packed.bounds is not None:
        arrays["bounds"] = packed.bounds.astype(np.int32)
    if proxy is not None:
        arrays |= {"proxy counts": proxy.counts, "proxy ids": proxy.ids.astype(np.int64), "proxy log_q": proxy.log_q}
    arrays |= {"tokens": tokens, "positions": positions, "predictors": predictors}
    arrays |= {"targets": part.targets.astype(np.int64)}
    arrays |= {"sequence ids": part.per_token(np.asarray(rows, dtype=np.int64))}
    there = to_device(arrays | {f"value {name}": value for name, value in values.items()}, device)
    packing: PackedSeqParams | None = None
    if spec.flex and packed.tree is not None:
        from megatron_rl.actor.model.flex_tree import flex_packing  # torch's compiler is imported only if it is used

        packing = flex_packing(there["bounds"], there["ends"], max(1, int(packed.tree.lengths.max(initial=0))))
    elif packed.tree is not None:
        packing = tree_packing(packed.tree, device, s - packed.tree.size)
    elif packed.bounds is not None:
        packing = _packing(there["bounds"], int(np.diff(packed.bounds).max()), spec.context_ranks > 1)
    return MicroBatch(
        tokens=there["tokens"],
        positions=there["positions"],
        packing=packing,
        predictors=there["predictors"],
        places=there.get("places"),
        targets=there["targets"],
        sequence_ids=there["sequence ids"],
        values={name: there[f"value {name}"] for name in values},
        marked=there.get("marked"),
        marked_places=marked_places,
        rows=tuple(rows),
        proxy=None if proxy is None else _proxy_store(there),
    )


def _held_part(
    tokens: Indices, positions: Indices, predictors: Indices, held: Indices
) -> tuple[Indices, Indices, Indices, Indices]:
    """Returns the tokens and positions that this rank holds, and which sampled tokens they predict."""
    place = np.full(tokens.shape[1], -1)
    place[held] = np.arange(len(held))
    local = place[predictors]
    return tokens[:, held], positions[:, held], local[local >= 0], np.flatnonzero(local >= 0)


def _packing(bounds: Tensor, longest: int, shared: bool) -> PackedSeqParams:
    """Returns Megatron's description of packed sequences.

    `longest`: length of the longest. `shared`: context-parallel ranks share each sequence; the bounds then include the
    padding of each sequence.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds if shared else None,
        cu_seqlens_kv_padded=bounds if shared else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _proxy_store(there: Mapping[str, Tensor]) -> ProxyStore:
    counts = there["proxy counts"]
    return ProxyStore(counts > 0, counts, there["proxy ids"], there["proxy log_q"])
