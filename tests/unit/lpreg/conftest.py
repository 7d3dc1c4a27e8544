"""Plain restatements of the definitions, with dense tensors, softmax and autograd, that lpreg must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass
class Dense:
    log_probs: Tensor
    entropy: Tensor
    log_z: Tensor
    in_filter: Tensor
    max_logit: Tensor
    p: Tensor
    q: Tensor
    """Detached; the frozen proxy."""
    filter_entropy: Tensor
    filter_extent: Tensor
    log_p: Tensor


def dense_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    min_p: float = 0.02,
    fixed_tau: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    vocab_size: int | None = None,
) -> Dense:
    x = logits[:, :vocab_size] / temperature
    log_p = torch.log_softmax(x, -1)
    p = log_p.exp()
    cut = min_p * p.amax(-1, keepdim=True) if fixed_tau is None else torch.full_like(p[:, :1], fixed_tau)
    ranked = p.detach().sort(-1, descending=True).values
    if top_k is not None:
        cut = ranked[:, min(top_k, x.shape[1]) - 1, None]
    if top_p is not None:
        before = ranked.cumsum(-1) - ranked
        cut = torch.where(before < top_p, ranked, torch.inf).amin(-1, keepdim=True)
    inside = p.detach() >= cut.detach()
    z = (p * inside).sum(-1)
    log_q = (log_p - z.log()[:, None]).masked_fill(~inside, 0.0)
    return Dense(
        log_probs=log_p.gather(1, targets[:, None])[:, 0],
        entropy=-(p * log_p.nan_to_num(neginf=0.0)).sum(-1),
        log_z=z.log(),
        in_filter=inside.gather(1, targets[:, None])[:, 0],
        max_logit=x.amax(-1),
        p=p.detach(),
        q=(p * inside / z[:, None]).detach(),
        filter_entropy=-(log_q.exp() * log_q * inside).sum(-1),
        filter_extent=inside.double().sum(-1).log() / max(math.log(x.shape[1]), math.log(2)),
        log_p=log_p,
    )


@pytest.fixture(scope="session")
def dense() -> Callable[..., Dense]:
    return dense_stats
