"""Gathers what context-parallel ranks know of tokens. Each rank has only those of the tokens that it predicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import TokenStats
from megatron_rl.parallel import process_groups


def gather_over_context_ranks(stats: TokenStats, places: Tensor, tokens: int) -> TokenStats:
    """Turns statistics of the tokens at `places` into statistics of all `tokens`, equal on every context-parallel rank.

    Every rank then computes the complete loss, but backpropagates only into its own tokens; the gradients of parameters
    are summed over these ranks anyway. Statistics with a `proxy_store` are not for this.
    """

    def gather(local: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(local, places, tokens)
        return gathered

    def flags(local: Tensor) -> Tensor:
        return gather(local.float()) > 0.5

    assert stats.proxy_store is None
    return replace(
        stats,
        log_probs=gather(stats.log_probs),
        entropy=None if stats.entropy is None else gather(stats.entropy),
        log_z=gather(stats.log_z),
        in_filter=flags(stats.in_filter),
        max_logit=gather(stats.max_logit),
        proxy_kl=None if stats.proxy_kl is None else gather(stats.proxy_kl),
        filter_entropy=None if stats.filter_entropy is None else gather(stats.filter_entropy),
        filter_extent=None if stats.filter_extent is None else gather(stats.filter_extent),
    )


def gather_rows(local: Tensor, places: Tensor | None, tokens: int) -> Tensor:
    """Turns rows of the tokens at `places` (None: all) into rows of all `tokens`, equal on every context-parallel rank.

    No gradient.
    """
    if places is None:
        return local
    rows = local.new_zeros(tokens, *local.shape[1:]).index_copy_(0, places, local)
    dist.all_reduce(rows, group=process_groups.cp_group())
    return rows


class _Gather(torch.autograd.Function):
    """Gathers by a sum. Each element is non-zero on its owner only, so the sum is exact."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, places: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(places)
        gathered = local.new_zeros(tokens).index_copy_(0, places, local)
        dist.all_reduce(gathered, group=process_groups.cp_group())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None
