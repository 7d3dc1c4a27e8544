"""`token_stats` with the LM head inside: it takes hidden states, and the logits never exist as a whole.

This is the recompute form. The forward projects a chunk of tokens, takes the statistics from its logits and drops them;
the backward projects the rows that have a gradient again. It needs four matrix products, where a head that keeps its
logits needs three, and works for any loss. `lpreg.fused_loss` needs three, for losses that are a sum over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpreg.statistics.checks import check_head, check_row_flags, check_row_tensor
from lpreg.statistics.head import Head, HeadGradient, gather_sequence, sum_over_ranks
from lpreg.statistics.proxy_store import ProxyStore, ShardProxy, filter_entries, make_store
from lpreg.statistics.row_gradients import row_gradients
from lpreg.statistics.row_statistics import (
    EntropyMode,
    Filter,
    RowStatistics,
    Settings,
    check_finite,
    combine,
    finish,
    ranks_of,
    resolve,
    statistics,
)
from lpreg.statistics.rows import filter_masses, summarise
from lpreg.statistics.shard import RowScale
from lpreg.statistics.token_stats import TokenStats, gradients_of, outputs_of


def fused_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    sequence_parallel: bool = False,
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
    proxy: ProxyStore | None = None,
    proxy_rows: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> TokenStats:
    """Returns `token_stats(hidden @ weight.T, targets, ...)`, with gradients of hidden and weight, in chunks of tokens.

    Work: 2 T d V/TP FLOPs per matrix product; one product forward and three backward, where rows without gradient are
    skipped. With a split vocabulary, rows that need log Z (name them in log_z_rows; None: a fifth product) and rows
    with a stored proxy are projected once more; rows whose proxy is to be stored are always projected once more. Memory
    beside the gradients: one fp32 chunk of logits, chunk_tokens * V/TP * 4 bytes (6 for bf16 input), and during the
    backward an fp32 sum of d weight. Communication: two small all-gathers in the forward, one sum of d hidden in the
    backward. Statistics are the same bits on every rank. Projecting twice may change the last bit of a logit, so a
    token exactly on the filter's edge may count as kept and yet not be in its Z.

    Args:
        hidden: [T, d], the same on every rank of tp_group; bf16, fp16, fp32 or fp64. With sequence_parallel this rank's
            [T/TP, d], equal parts in rank order: they are all-gathered in the forward and kept for the backward, and
            the gradient is reduce-scattered. All other arguments are about all T tokens on every rank.
        weight: [V/TP, d], this rank's rows of the LM head, dtype of hidden; rows beyond vocab_size are never read.
        targets: [T] int64, sampled tokens as ids in the whole vocabulary. chunk_tokens: tokens that are projected at a
        time. None: 512 on a CPU, 2048 elsewhere. weight_grad: [V/TP, d] fp32 (fp64 for fp64 input), to which the
        backward adds the gradient of weight instead of
            returning it to autograd, such as Megatron's `main_grad`: in full precision, without a second sum of that
            size.
        The others: as in `token_stats`, which also has inplace_backward: here logits never outlive their chunk.

    Raises:
        ValueError: arguments that do not fit together, a target outside the vocabulary, logits that are not finite.
    """
    check_head(hidden, weight, chunk_tokens, weight_grad)
    tokens = hidden.shape[0] * (ranks_of(tp_group) if sequence_parallel else 1)
    check_row_tensor("targets", targets, torch.int64, tokens, hidden, "hidden states")
    flags = {"log_z_rows": log_z_rows, "proxy_rows": proxy_rows, "proxy.stored": proxy.stored if proxy else None}
    check_row_flags(tokens, hidden, "hidden states", flags)
    keeps = Filter(min_p, fixed_tau, top_k, top_p)
    settings, columns_of_targets = resolve(
        weight.shape[0], targets, temperature, keeps, vocab_size, tp_group, entropy, filter_entropy
    )
    if log_z_rows is not None and proxy_rows is not None:
        log_z_rows = log_z_rows | proxy_rows
    *values, threshold, log_total = _FusedTokenStats.apply(
        hidden,
        weight,
        columns_of_targets,
        log_z_rows,
        settings,
        chunk_tokens,
        sequence_parallel,
        settings.shard_proxy(proxy),
        weight_grad,
    )
    store = None
    if proxy_rows is not None:
        whole = gather_sequence(hidden.detach(), tp_group) if sequence_parallel else hidden.detach()
        head = Head(whole, weight.detach(), columns_of_targets, settings, chunk_tokens)
        scale, log_z = RowScale(values[4], log_total, threshold, log_total), values[2].detach()
        parts = [
            filter_entries(head.project(rows), None, scale.of(rows), log_z[rows])
            for _, rows in head.chunks(proxy_rows.nonzero().squeeze(1))
        ]
        store = make_store(proxy_rows, settings.first, parts)
    return TokenStats.of(values, settings, proxy, store)


class _FusedTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        log_z_rows: Tensor | None,
        settings: Settings,
        chunk_tokens: int | None,
        sequence_parallel: bool,
        proxy: ShardProxy | None,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if sequence_parallel:
            hidden = gather_sequence(hidden, settings.tp_group)
        head = Head(hidden, weight, targets, settings, chunk_tokens)
        one_rank = ranks_of(settings.tp_group) == 1
        stats = _in_one_pass(head, log_z_rows, proxy) if one_rank else _over_ranks(head, log_z_rows, proxy)
        check_finite(stats)
        ctx.proxy, ctx.weight_grad, ctx.scale = proxy, weight_grad, stats.scale
        ctx.settings, ctx.chunk_tokens, ctx.sequence_parallel = settings, chunk_tokens, sequence_parallel
        ctx.save_for_backward(hidden, weight, targets, log_z_rows, stats.log_z, stats.filter_entropy)
        return outputs_of(ctx, stats, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z_rows, log_z, filter_entropy = ctx.saved_tensors
        settings: Settings = ctx.settings
        head = Head(hidden, weight, targets, settings, ctx.chunk_tokens)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = HeadGradient(head, need_hidden, weight.shape[0] if need_weight else 0, ctx.weight_grad)
        grads = row_gradients(
            gradients_of(output_grads), log_z, filter_entropy, log_z_rows, settings.temperature, ctx.proxy
        )
        for _place, rows in head.chunks(total.rows(grads.active)):
            total.add(rows, head.project(rows), grads.of(rows), ctx.scale.of(rows))
        d_hidden = total.hidden
        if d_hidden is not None:
            d_hidden = sum_over_ranks(d_hidden, ctx.sequence_parallel, settings.tp_group)
        d_weight = None if total.weight is None or ctx.weight_grad is not None else total.weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def _in_one_pass(head: Head, log_z_rows: Tensor | None, proxy: ShardProxy | None) -> RowStatistics:
    """Returns the statistics of one rank alone, which takes a chunk's log Z while its logits are there."""
    parts = [
        statistics(
            head.project(rows),
            None if log_z_rows is None else log_z_rows[rows],
            head.settings,
            None if proxy is None else proxy.take(rows),
        )
        for _, rows in head.chunks()
    ]
    return RowStatistics.join(parts)


def _over_ranks(head: Head, log_z_rows: Tensor | None, proxy: ShardProxy | None) -> RowStatistics:
    """Returns the statistics over ranks by two collectives, whatever the number of chunks. Rows that need log Z and
    rows with a stored proxy are projected twice for that."""
    with_entropy = head.settings.with_entropy
    likeliest = head.settings.filter.likeliest
    packs = [summarise(head.project(rows), with_entropy, likeliest) for _, rows in head.chunks()]
    totals = combine(torch.cat(packs, 1), head.settings)
    wanted = None if log_z_rows is None else log_z_rows.nonzero().squeeze(1)
    masses, divergence = [], []
    for _, rows in head.chunks(wanted):
        shard, scale = head.project(rows), totals.scale.of(rows)
        masses.append(filter_masses(shard, None, scale, head.settings.filter_entropy))
        if proxy is not None and wanted is None:
            divergence.append(proxy.take(rows).divergence(shard, scale))
    if proxy is None:
        return finish(totals, torch.cat(masses, 1), wanted, head.settings)
    if wanted is not None:  # rows with a stored proxy may be others
        divergence = [
            proxy.take(rows).divergence(head.project(rows), totals.scale.of(rows)) for _, rows in head.chunks()
        ]
    return finish(totals, torch.cat(masses, 1), wanted, head.settings, proxy.stored, torch.cat(divergence))
