"""Token statistics over context-parallel ranks: each has those of the tokens it predicts, and the loss wants all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import ProxyStore, TokenStats
from megatron_rl.parallel import process_groups


def whole_over_context(stats: TokenStats, places: Tensor, tokens: int) -> TokenStats:
    """Statistics of the tokens at `places` -> of all `tokens`, the same on every context-parallel rank.

    Every rank then has the whole loss, and the gradient of its own tokens alone; parameters' gradients are summed over
    these ranks anyway. A proxy's entries stay where they are: the others' tokens have none.
    """

    def whole(local: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(local, places, tokens)
        return gathered

    def flags(local: Tensor) -> Tensor:
        return whole(local.float()) > 0.5

    store = stats.proxy_store
    return replace(
        stats,
        log_probs=whole(stats.log_probs),
        entropy=None if stats.entropy is None else whole(stats.entropy),
        log_z=whole(stats.log_z),
        kept=flags(stats.kept),
        max_logit=whole(stats.max_logit),
        proxy_kl=None if stats.proxy_kl is None else whole(stats.proxy_kl),
        proxy_store=None if store is None else _widened(store, places, tokens),
    )


def _widened(store: ProxyStore, places: Tensor, tokens: int) -> ProxyStore:
    stored, counts = (value.new_zeros(tokens).index_copy_(0, places, value) for value in (store.stored, store.counts))
    return ProxyStore(stored, counts, store.ids, store.log_q)


class _Gather(torch.autograd.Function):
    """Each element has one owner and is 0 elsewhere, so that the sum is exact."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, places: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(places)
        whole = local.new_zeros(tokens).index_copy_(0, places, local)
        dist.all_reduce(whole, group=process_groups.cp_group())
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None
