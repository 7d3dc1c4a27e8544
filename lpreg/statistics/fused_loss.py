"""LM head and policy loss in one: the gradients of hidden and weight are taken while a chunk's logits are still there.

This form takes gradients in the forward: three matrix products, where `fused_token_stats` needs four. It is for losses
that are a sum over tokens, so that a chunk's gradient does not depend on other chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpreg.losses.base import LossOutput, Mean, PolicyLoss
from lpreg.losses.inputs import LossInputs, check_counted
from lpreg.statistics.checks import check_head, check_row_flags, check_row_tensor
from lpreg.statistics.head import (
    Head,
    HeadGradient,
    compact,
    gather_sequence,
    sum_over_ranks,
)
from lpreg.statistics.proxy_store import ProxyStore, ShardProxy
from lpreg.statistics.row_gradients import RowGradients, StatisticGradients, row_gradients
from lpreg.statistics.row_statistics import (
    EntropyMode,
    Filter,
    RowStatistics,
    Settings,
    check_finite,
    ranks_of,
    resolve,
    statistics,
)
from lpreg.statistics.shard import Shard
from lpreg.statistics.token_stats import TokenStats, values_of

FROM_THE_MODEL = ("log_probs", "entropy", "log_z", "in_filter", "proxy_kl", "filter_entropy", "filter_extent")


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: PolicyLoss,
    inputs: Mapping[str, Any],
    *,
    chunk_tokens: int | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    log_z_rows: Tensor | None = None,
    entropy: EntropyMode = "metric",
    proxy: ProxyStore | None = None,
    weight_grad: Tensor | None = None,
) -> tuple[LossOutput, TokenStats]:
    """Returns the loss over `fused_token_stats(hidden, weight, targets)`, with gradients of hidden and weight ready.

    Work: three products of 2 T d V/TP FLOPs, of which rows without gradient skip two. Memory: one fp32 chunk of logits,
    chunk_tokens * V/TP * 4 bytes (6 for bf16 input), and from the forward to the backward d hidden [T, d] and an fp32
    d weight [V/TP, d]. Communication: two small all-gathers per chunk and one sum of d hidden, all in the forward; none
    in the backward. If no gradient is needed: one product, and no memory beside the chunk.

    Args:
        hidden, weight, targets, chunk_tokens, sequence_parallel, temperature, vocab_size, tp_group, log_z_rows, proxy:
        as in `fused_token_stats`. The filter is the one that the loss needs. loss: a method that is `token_separable`.
        inputs: the fields of LossInputs by name, except those that come from the model (log_probs, entropy, log_z,
        kept);
            tensors [T], all tokens, on every rank.
        entropy: "metric" gives the loss the entropy without gradient, "none" gives no entropy; a loss that needs the
            gradient of the entropy always gets it.
        weight_grad: [V/TP, d] fp32 (fp64 for fp64 input), to which the gradient of weight is added instead of being
            returned to autograd, such as Megatron's `main_grad`. This happens in the forward, so the loss must then be
            differentiated with a gradient of 1; there is no second sum of that size.

    Returns:
        The output of the loss (its `loss` may be differentiated once), and the statistics without gradient.

    Raises:
        ValueError: as `fused_token_stats`; a loss that is no sum over tokens; an input that is unknown or does not fit.
    """
    if not loss.token_separable:
        raise ValueError(f"{loss.name} as set up looks at more than one token at a time: use fused_token_stats")
    check_head(hidden, weight, chunk_tokens, weight_grad)
    tokens = hidden.shape[0] * (ranks_of(tp_group) if sequence_parallel else 1)
    check_row_tensor("targets", targets, torch.int64, tokens, hidden, "hidden states")
    flags = {"log_z_rows": log_z_rows, "proxy.stored": proxy.stored if proxy else None}
    check_row_flags(tokens, hidden, "hidden states", flags)
    _check_inputs(inputs, tokens)
    own = loss.token_stats_kwargs()
    keeps = Filter(own.get("min_p", 0.02), own.get("fixed_tau"), own.get("top_k"), own.get("top_p"))
    entropy, filter_entropy = own.get("entropy", entropy), own.get("filter_entropy", False)
    settings, columns_of_targets = resolve(
        weight.shape[0], targets, temperature, keeps, vocab_size, tp_group, entropy, filter_entropy
    )
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    with torch.no_grad():
        whole = gather_sequence(hidden, tp_group) if sequence_parallel else hidden
        head = Head(whole.detach(), weight.detach(), columns_of_targets, settings, chunk_tokens)
        total = HeadGradient(head, need_hidden, weight.shape[0] if need_weight else 0, weight_grad)
        output, stats = _forward(head, total, loss, inputs, log_z_rows, settings.shard_proxy(proxy))
        d_hidden = total.hidden
        if d_hidden is not None:
            d_hidden = sum_over_ranks(d_hidden, sequence_parallel, tp_group)
    d_weight = total.weight if weight_grad is None else None
    attached = _WithGradients.apply(hidden, weight, output.loss, d_hidden, d_weight, weight_grad is not None)
    return LossOutput(attached, output.metrics), TokenStats.of(values_of(stats), settings, proxy, None)


def _forward(
    head: Head,
    total: HeadGradient,
    loss: PolicyLoss,
    inputs: Mapping[str, Any],
    log_z_rows: Tensor | None,
    proxy: ShardProxy | None,
) -> tuple[LossOutput, RowStatistics]:
    parts: list[RowStatistics] = []
    value: Tensor | None = None
    metrics: dict[str, Mean] = {}
    for place, rows in head.chunks():
        shard = head.project(rows)
        z_rows = None if log_z_rows is None else log_z_rows[rows]
        chunk_proxy = None if proxy is None else proxy.take(rows)
        stats = statistics(shard, z_rows, head.settings, chunk_proxy)
        check_finite(stats, place.start)
        parts.append(stats)
        some = {name: field[rows] if _is_per_token(field) else field for name, field in inputs.items()}
        leaves = _leaves(stats, head.settings, proxy)
        extent = stats.filter_extent if head.settings.filter_entropy else None
        with torch.enable_grad():
            output = loss(LossInputs(**leaves, in_filter=stats.in_filter, filter_extent=extent, **some))
        value = output.loss.detach() if value is None else value + output.loss.detach()
        metrics = {name: metrics[name] + mean if metrics else mean for name, mean in output.metrics.items()}
        if (total.hidden is None and total.weight is None) or not output.loss.requires_grad:
            continue
        of = _differentiate(output.loss, leaves)
        grads = row_gradients(of, stats.log_z, stats.filter_entropy, z_rows, shard.temperature, chunk_proxy)
        _add_gradient(total, place, shard, grads, stats)
    assert value is not None  # there is at least one chunk
    return LossOutput(value, metrics), RowStatistics.join(parts)


def _check_inputs(inputs: Mapping[str, Any], tokens: int) -> None:
    known = {field.name for field in fields(LossInputs)} - set(FROM_THE_MODEL)
    for name, value in inputs.items():
        if name not in known:
            why = "comes from the model" if name in FROM_THE_MODEL else "is not a field of LossInputs"
            raise ValueError(f"inputs[{name!r}] {why}; known: {', '.join(sorted(known))}")
        if _is_per_token(value) and value.shape != (tokens,):
            raise ValueError(f"inputs[{name!r}] must have shape [{tokens}] to fit the targets, got {list(value.shape)}")
    check_counted(inputs, inputs.get("mask"))  # a chunk would count its tokens from its own start


def _is_per_token(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _leaves(stats: RowStatistics, settings: Settings, proxy: ShardProxy | None) -> dict[str, Tensor]:
    leaves = {"log_probs": stats.log_probs, "log_z": stats.log_z}
    if proxy is not None:
        leaves["proxy_kl"] = stats.proxy_kl
    if settings.filter_entropy:
        leaves["filter_entropy"] = stats.filter_entropy
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    if settings.with_entropy:
        leaves["entropy"] = stats.entropy.detach().requires_grad_(settings.entropy == "grad")
    return leaves


def _differentiate(loss: Tensor, leaves: dict[str, Tensor]) -> StatisticGradients:
    """Returns the gradients by the names of the leaves; None if the loss does not depend on a leaf."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return cast(StatisticGradients, dict(zip(wanted, gradients, strict=True)))


def _add_gradient(total: HeadGradient, place: slice, shard: Shard, grads: RowGradients, stats: RowStatistics) -> None:
    rows = total.rows(grads.active)
    if rows is None:
        total.add(place, shard, grads, stats.scale)
    elif len(rows):
        total.add(rows + place.start, compact(shard, rows), grads.of(rows), stats.scale.of(rows))


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
        weight_is_done: bool,
    ) -> Tensor:
        ctx.weight_dtype, ctx.weight_is_done = weight.dtype, weight_is_done
        ctx.save_for_backward(d_hidden, d_weight)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.weight_is_done:
            torch._assert_async(grad == 1, "the weight's gradient was added already, for a gradient of 1 of the loss")
        d_hidden, d_weight = ctx.saved_tensors
        # In place to save memory; a second backward is then an error and not a wrong number.
        d_hidden = None if d_hidden is None else d_hidden.mul_(grad)
        d_weight = None if d_weight is None else d_weight.mul_(grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None
