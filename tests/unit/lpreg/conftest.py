"""Plain restatements of the definitions, with dense tensors, softmax and autograd, that lpreg must agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    log_p: Tensor


def dense_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    min_p: float = 0.02,
    fixed_tau: float | None = None,
    vocab_size: int | None = None,
) -> Dense:
    x = logits[:, :vocab_size] / temperature
    log_p = torch.log_softmax(x, -1)
    p = log_p.exp()
    cut = min_p * p.amax(-1, keepdim=True) if fixed_tau is None else torch.full_like(p[:, :1], fixed_tau)
    inside = p.detach() >= cut.detach()
    z = (p * inside).sum(-1)
    return Dense(
        log_probs=log_p.gather(1, targets[:, None])[:, 0],
        entropy=-(p * log_p.nan_to_num(neginf=0.0)).sum(-1),
        log_z=z.log(),
        in_filter=inside.gather(1, targets[:, None])[:, 0],
        max_logit=x.amax(-1),
        p=p.detach(),
        q=(p * inside / z[:, None]).detach(),
        log_p=log_p,
    )


@pytest.fixture(scope="session")
def dense() -> Callable[..., Dense]:
    return dense_stats


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
