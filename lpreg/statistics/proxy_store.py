"""The sparse proxy of another policy: token ids and log q inside the filter, for the few tokens that need it.

Lp-Reg's full KL against the policy that generated the batch, or a lagged one, needs q over the whole filter S, which
holds a handful of tokens out of the vocabulary. A forward without gradients of that policy fills a store
(`proxy_rows` of `token_stats`), and the forward of the policy in training reads it (`proxy`): it gives
KL(q || p) = sum over S of q (log q - log p), whose gradient over the logits is p - q, bounded whatever p has become.

Legend: T tokens, R of them stored, E entries of all stored tokens together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lpreg.statistics.checks import refuse
from lpreg.statistics.shard import Rows, RowScale, Shard, on_gpu


@dataclass(frozen=True, slots=True, eq=False)
class ProxyStore:
    """q over S of those of the T tokens that are stored. Under tensor parallelism a rank needs only the entries of its
    own columns: it ignores other entries, and a store that it filled holds no others."""

    stored: Tensor
    """[T] bool, tokens whose q is stored; the same on every rank."""
    counts: Tensor
    """[T] int64, number of entries of each token."""
    ids: Tensor
    """[E] int64, ids in the whole vocabulary, each at most once per token; token after token."""
    log_q: Tensor
    """[E] fp32 (fp64 for fp64 logits)."""

    def __post_init__(self) -> None:
        if self.stored.ndim != 1 or self.stored.dtype != torch.bool:
            raise ValueError(f"stored must be bool of shape [T], got {self.stored.dtype} {list(self.stored.shape)}")
        if self.counts.shape != self.stored.shape or self.counts.dtype != torch.int64:
            raise ValueError(
                f"counts must be int64 of shape {list(self.stored.shape)} to fit stored, "
                f"got {self.counts.dtype} of shape {list(self.counts.shape)}"
            )
        entries = self.ids.shape[0]
        if self.ids.shape != (entries,) or self.log_q.shape != (entries,) or self.ids.dtype != torch.int64:
            raise ValueError(
                "ids must be int64 and log_q floating point, both of shape [E], "
                f"got {self.ids.dtype} {list(self.ids.shape)} and {self.log_q.dtype} {list(self.log_q.shape)}"
            )
        wrong = self.counts.sum() != entries
        refuse(wrong, lambda: f"there are {entries} ids, but counts sum up to {int(self.counts.sum())}")

    def split(self, sizes: Sequence[int]) -> list[ProxyStore]:
        """Returns the stores of consecutive tokens, `sizes` tokens each."""
        counts = self.counts.split(sizes)
        entries = [int(part.sum()) for part in counts]
        parts = (self.stored.split(sizes), counts, self.ids.split(entries), self.log_q.split(entries))
        return [ProxyStore(*part) for part in zip(*parts, strict=True)]

    @classmethod
    def join(cls, stores: Sequence[ProxyStore]) -> ProxyStore:
        """Returns one store of consecutive tokens."""
        return cls(*(torch.cat([getattr(store, field.name) for store in stores]) for field in fields(cls)))

    def shard(self, first: int, columns: int) -> ShardProxy:
        """Returns the entries of the rank that holds the ids in [first, first + columns)."""
        token = torch.repeat_interleave(self.counts, output_size=self.ids.shape[0])
        whole = ShardProxy(self.stored, token, self.ids - first, self.log_q)
        return whole.only((whole.columns >= 0) & (whole.columns < columns), columns)


@dataclass(frozen=True, slots=True, eq=False)
class ShardProxy:
    """A store's entries in one rank's columns, ready to be read a few tokens at a time.

    On a GPU a selection keeps its size, since the host would wait to learn a smaller one: entries that are not selected
    have q = 0, at a token and a column that exist.
    """

    stored: Tensor
    """[T] bool, over all ranks."""
    tokens: Tensor
    """[E] int64, the token of each entry."""
    columns: Tensor
    """[E] int64, columns of this rank."""
    log_q: Tensor
    """[E]."""

    def only(self, own: Tensor, places: int) -> ShardProxy:
        """Returns the entries marked by `own` [E]. places: number of columns, or of tokens, that there are; with 0 no
        entry is marked."""
        if places == 0 or not on_gpu(own):
            return ShardProxy(self.stored, self.tokens[own], self.columns[own], self.log_q[own])
        tokens, columns = (torch.where(own, index, 0) for index in (self.tokens, self.columns))
        return ShardProxy(self.stored, tokens, columns, torch.where(own, self.log_q, -torch.inf))

    def take(self, rows: Rows) -> ShardProxy:
        """Returns the entries of the given tokens, each of which is named once; their order becomes the tokens'."""
        stored = self.stored[rows]
        if isinstance(rows, slice):
            tokens = self.tokens - rows.indices(self.stored.shape[0])[0]
        else:
            places = torch.arange(rows.shape[0], device=rows.device)
            tokens = torch.full_like(self.stored, -1, dtype=torch.int64).index_copy_(0, rows, places)[self.tokens]
        moved = ShardProxy(stored, tokens, self.columns, self.log_q)
        return moved.only((tokens >= 0) & (tokens < stored.shape[0]), stored.shape[0])

    def divergence(self, shard: Shard, scale: RowScale) -> Tensor:
        """Returns this shard's part of KL(q || p), [T]; 0 for tokens that are not stored."""
        x = shard.logits[self.tokens, self.columns].to(shard.dtype) / shard.temperature
        log_p = (x - scale.max_logit[self.tokens]) - scale.log_total[self.tokens]
        log_q = self.log_q.to(shard.dtype)
        parts = torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0)
        return torch.zeros_like(scale.log_total).index_add_(0, self.tokens, parts)


def filter_entries(shard: Shard, rows: Tensor | None, scale: RowScale, log_z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns counts [R], columns [E] and log q [E] of the columns inside the filter x >= threshold, in `rows` of the
    shard or (None) all rows. log_z: [T]; log q = log p - log Z.
    """
    none = shard.targets.new_zeros(0)
    parts = [(none, none, log_z.new_zeros(0))]
    buffer = shard.buffer()
    for _, chunk in shard.chunks(rows):
        x = shard.read(chunk, buffer)
        inside = x >= scale.threshold[chunk, None]
        place, column = inside.nonzero().unbind(1)
        parts.append((inside.sum(-1), column, scale.log_p_(x, chunk)[place, column] - log_z[chunk][place]))
    counts, columns, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    return counts, columns, log_q


def make_store(stored: Tensor, first: int, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> ProxyStore:
    """Returns the store of consecutive stored tokens from the results of `filter_entries`; stored: [T] bool; first: the
    id of the shard's column 0."""
    counts, columns, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    return ProxyStore(stored, stored.long().masked_scatter_(stored, counts), columns + first, log_q)
