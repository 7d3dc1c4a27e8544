"""Rows as padded tensors. Legend: b rows, s positions, T response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpreg import ProxyStore
from megatron_rl.batching.rows import Rows
from megatron_rl.batching.stored_proxy import StoredProxy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded rows. The last token of a row is only a target, so s is the longest row less one."""

    tokens: Tensor
    """[b, s]"""
    positions: Tensor
    """[b, s]"""
    predictors: Tensor
    """[T], where in the flattened [b * s] the logits of each response token are."""
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


def micro_batch(batch: Rows, rows: Sequence[int], device: torch.device) -> MicroBatch:
    """The given rows of the batch, on the device."""
    part = batch.take(rows)
    lengths, starts = part.lengths, part.prompt_lengths
    width = int(lengths.max()) - 1
    tokens = np.zeros((len(part), width), dtype=np.int64)
    for i, row in enumerate(part.tokens):
        tokens[i, : len(row) - 1] = row[:-1]
    predictors = np.concatenate(
        [
            np.arange(start - 1, length - 1) + i * width
            for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
    )

    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device)

    return MicroBatch(
        tokens=tensor(tokens),
        positions=torch.arange(width, device=device).expand(len(part), width).contiguous(),
        predictors=tensor(predictors),
        targets=tensor(part.targets),
        sequence_ids=tensor(part.per_token(np.asarray(rows, dtype=np.int64))),
        values={name: tensor(value) for name, value in part.values.items()},
        rows=tuple(rows),
        proxy=None if part.proxy is None else _proxy_store(part.proxy, device),
    )


def _proxy_store(proxy: StoredProxy, device: torch.device) -> ProxyStore:
    counts = torch.tensor(proxy.counts, device=device)
    ids = torch.tensor(proxy.ids, device=device, dtype=torch.int64)
    return ProxyStore(counts > 0, counts, ids, torch.tensor(proxy.log_q, device=device))
