"""Exact statistics of each token's logits for a loss, with the vocabulary split over tensor-parallel ranks.

The forward reads every row once, all-gathers four floats per token and combines them in rank order, so every rank holds
the same bits; rows that need log Z are read a second time and gathered once more. The backward is local and writes the
gradient over the logits if asked to. The row arithmetic is in `lpreg.statistics.rows` and
`lpreg.statistics.row_statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpreg.statistics.checks import check_logits, check_row_flags, check_row_tensor
from lpreg.statistics.proxy_store import ProxyStore, ShardProxy, filter_entries, make_store
from lpreg.statistics.row_gradients import StatisticGradients, row_gradients
from lpreg.statistics.row_statistics import (
    EntropyMode,
    Filter,
    RowStatistics,
    Settings,
    check_finite,
    resolve,
    statistics,
)
from lpreg.statistics.rows import write_gradient
from lpreg.statistics.shard import RowScale, Shard


@dataclass(frozen=True, slots=True, eq=False)
class TokenStats:
    """Statistics of T tokens at the sampling temperature, fp32 (fp64 for fp64 logits); the same bits on each rank."""

    log_probs: Tensor
    """[T], log-prob of the sampled token. Differentiable."""
    entropy: Tensor | None
    """[T], entropy in nats. Differentiable with entropy="grad"; None with entropy="none"."""
    log_z: Tensor
    """[T], log of the probability mass that the filter keeps, <= 0. It is 0 where log_z_rows is False and -inf where a
    fixed_tau keeps nothing; neither has a gradient. Elsewhere d(-log_z)/d logits = p - q (times 1 / temperature), which
    is also the gradient of KL(q || p) with q held fixed."""
    in_filter: Tensor
    """[T] bool, whether the sampled token passes the filter. Known for every row, whatever log_z_rows is."""
    max_logit: Tensor
    """[T], largest logit after the temperature."""
    proxy_kl: Tensor | None = None
    """[T], KL(q || p) of the stored `proxy` q over the whole vocabulary; 0 without gradient where none is stored. Its
    gradient over the logits is p - q (times 1 / temperature). None without a proxy."""
    proxy_store: ProxyStore | None = None
    """This policy's own q in `proxy_rows`, for a later `proxy`: the entries of this rank's columns. None without
    proxy_rows."""
    filter_entropy: Tensor | None = None
    """[T], entropy of q in nats, with its gradient over the logits of the filter; 0 where log_z_rows is False or the
    filter keeps nothing. None unless asked for."""
    filter_extent: Tensor | None = None
    """[T], ln |S| / ln V: the largest possible entropy of q, as a share of the largest possible one of p; 0 where
    log_z_rows is False. None unless filter_entropy is asked for."""

    @classmethod
    def of(
        cls, values: Sequence[Tensor], settings: Settings, proxy: ProxyStore | None, store: ProxyStore | None
    ) -> TokenStats:
        """Returns the statistics from the values of `values_of`; those that were not asked for are dropped."""
        log_probs, entropy, log_z, in_filter, max_logit, proxy_kl, filter_entropy, filter_extent = values
        return cls(
            log_probs,
            entropy if settings.with_entropy else None,
            log_z,
            in_filter,
            max_logit,
            None if proxy is None else proxy_kl,
            store,
            filter_entropy if settings.filter_entropy else None,
            filter_extent if settings.filter_entropy else None,
        )

    @property
    def proxy_log_probs(self) -> Tensor:
        """[T], log q of the sampled token: log_probs - log_z if in_filter, otherwise -inf. Needs the row's log_z."""
        return torch.where(self.in_filter, self.log_probs - self.log_z, -torch.inf)


def values_of(stats: RowStatistics) -> tuple[Tensor, ...]:
    """Returns what `TokenStats.of` takes."""
    return (
        stats.log_probs,
        stats.entropy,
        stats.log_z,
        stats.in_filter,
        stats.max_logit,
        stats.proxy_kl,
        stats.filter_entropy,
        stats.filter_extent,
    )


def outputs_of(ctx: Any, stats: RowStatistics, settings: Settings) -> tuple[Tensor, ...]:
    """Returns the outputs of an autograd function of the statistics: `values_of`, the threshold and the log total.

    Marks in its context those that have no gradient.
    """
    constants = [stats.in_filter, stats.max_logit, stats.threshold, stats.log_total, stats.filter_extent]
    ctx.mark_non_differentiable(*constants, *([] if settings.entropy == "grad" else [stats.entropy]))
    ctx.set_materialize_grads(False)
    return *values_of(stats), stats.threshold, stats.log_total


def gradients_of(output_grads: Sequence[Tensor | None]) -> StatisticGradients:
    """Returns the gradients of the outputs of `outputs_of`, which come in their order, by name."""
    log_probs, entropy, log_z, _in_filter, _max_logit, proxy_kl, filter_entropy, *_ = output_grads
    return StatisticGradients(
        log_probs=log_probs, entropy=entropy, log_z=log_z, proxy_kl=proxy_kl, filter_entropy=filter_entropy
    )


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    min_p: float = 0.02,
    fixed_tau: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    filter_entropy: bool = False,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    log_z_rows: Tensor | None = None,
    entropy: EntropyMode = "metric",
    inplace_backward: bool = False,
    proxy: ProxyStore | None = None,
    proxy_rows: Tensor | None = None,
) -> TokenStats:
    """Returns log-prob, entropy and filter mass of each sampled token (Lp-Reg's proxy distribution, arXiv 2510.03222).

    With x = logits / temperature and p = softmax(x), the filter keeps S = {v : p_v >= min_p * max p}, or
    {v : p_v >= fixed_tau}, the top_k likeliest tokens, or the likeliest tokens that together have top_p, if one of
    these is given; Z is the mass of S, and the proxy is q = p / Z on S, 0 elsewhere. Tokens that tie with the last one
    of a top-k or top-p set are in S, and a top-p set has no more than NUCLEUS_TOKENS others.

    Args:
        logits: [T, V/TP], raw, this rank's slice (ranks hold equal slices in rank order); bf16, fp16, fp32 or fp64.
        targets: [T] int64, sampled tokens as ids in the whole vocabulary.
        vocab_size: the true V; columns at or beyond it are padding. None: there is no padding.
        tp_group: the ranks that the vocabulary is split over. None: `logits` hold the whole vocabulary.
        log_z_rows: [T] bool, the same on every rank, the rows whose log Z is needed. None: all rows.
        entropy: "metric" (no gradient), "grad" or "none".
        filter_entropy: compute the entropy of q and ln |S| / ln V too, in the rows whose log Z is needed.
        inplace_backward: write the gradient over the logits' memory. Only for logits that are not read after the loss.
        proxy: q of another policy for some of the T tokens, on the logits' device; gives proxy_kl.
        proxy_rows: [T] bool, the same on every rank, the rows whose q is to be stored; their log Z is computed too.

    Raises:
        ValueError: arguments that do not fit together, a target outside the vocabulary, a row that is not finite.
    """
    check_logits(logits, inplace_backward)
    check_row_tensor("targets", targets, torch.int64, logits.shape[0], logits, "logits")
    flags = {"log_z_rows": log_z_rows, "proxy_rows": proxy_rows, "proxy.stored": proxy.stored if proxy else None}
    check_row_flags(logits.shape[0], logits, "logits", flags)
    keeps = Filter(min_p, fixed_tau, top_k, top_p)
    settings, columns_of_targets = resolve(
        logits.shape[1], targets, temperature, keeps, vocab_size, tp_group, entropy, filter_entropy
    )
    if log_z_rows is not None and proxy_rows is not None:
        log_z_rows = log_z_rows | proxy_rows
    *values, threshold, log_total = _TokenStats.apply(
        logits, columns_of_targets, log_z_rows, settings, inplace_backward, settings.shard_proxy(proxy)
    )
    store = None
    if proxy_rows is not None:
        shard = Shard(logits.detach(), columns_of_targets, settings.columns, settings.temperature)
        rows = proxy_rows.nonzero().squeeze(1)
        scale = RowScale(values[4], log_total, threshold, log_total)
        parts = filter_entries(shard, rows, scale, values[2].detach())
        store = make_store(proxy_rows, settings.first, [parts])
    return TokenStats.of(values, settings, proxy, store)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        columns_of_targets: Tensor,
        log_z_rows: Tensor | None,
        settings: Settings,
        inplace: bool,
        proxy: ShardProxy | None,
    ) -> tuple[Tensor, ...]:
        shard = Shard(logits, columns_of_targets, settings.columns, settings.temperature)
        stats = statistics(shard, log_z_rows, settings, proxy)
        check_finite(stats)
        ctx.settings, ctx.inplace, ctx.proxy, ctx.scale = settings, inplace, proxy, stats.scale
        ctx.save_for_backward(logits, columns_of_targets, log_z_rows, stats.log_z, stats.filter_entropy)
        return outputs_of(ctx, stats, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor, None, None, None, None, None]:
        logits, columns_of_targets, log_z_rows, log_z, filter_entropy = ctx.saved_tensors
        shard = Shard(logits.detach(), columns_of_targets, ctx.settings.columns, ctx.settings.temperature)
        gradients = row_gradients(
            gradients_of(output_grads), log_z, filter_entropy, log_z_rows, shard.temperature, ctx.proxy
        )
        out = shard.logits if ctx.inplace else torch.empty_like(logits)
        write_gradient(out, shard, gradients, ctx.scale)
        return out, None, None, None, None, None
