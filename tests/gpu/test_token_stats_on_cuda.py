"""Token statistics on CUDA equal those on the CPU up to the rounding of the input type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lpreg import TokenStats, fused_token_stats, postponed_checks, token_stats

pytestmark = pytest.mark.gpu

FLOATS = ("log_probs", "entropy", "log_z", "max_logit")
Statistics = Callable[[Tensor, Tensor, Tensor], TokenStats]


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenStats:
    return token_stats(hidden.float() @ weight.float().T, targets)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenStats:
    return fused_token_stats(hidden, weight, targets, chunk_tokens=16)


@pytest.mark.parametrize("compute", [materialised, fused])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_on_cuda_equal_those_on_the_cpu(compute: Statistics, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype).requires_grad_() for n in (40, 64))
    targets = torch.randint(64, (40,), generator=generator)
    there = [leaf.detach().cuda().requires_grad_() for leaf in (hidden, weight)]
    got, want = compute(*there, targets.cuda()), compute(hidden, weight, targets)
    for name in FLOATS:
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(want, name), rtol=1e-3, atol=1e-3)
    got_grads = torch.autograd.grad((got.log_probs - got.log_z).sum(), there)
    want_grads = torch.autograd.grad((want.log_probs - want.log_z).sum(), [hidden, weight])
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad.cpu(), want_grad, rtol=2e-2, atol=2e-2)


@pytest.mark.measured
def test_a_stored_proxy_is_read_without_waiting_for_the_gpu() -> None:
    generator = torch.Generator().manual_seed(1)
    old, new, weight = (torch.randn(n, 16, generator=generator) for n in (40, 40, 64))
    targets = torch.randint(64, (40,), generator=generator)
    rows = torch.rand(40, generator=generator) < 0.3

    def gradient(device: str, mode: str) -> Tensor:
        there = [tensor.to(device) for tensor in (old, weight, targets, rows)]
        hidden = new.to(device).requires_grad_()
        store = fused_token_stats(there[0], there[1], there[2], proxy_rows=there[3]).proxy_store
        torch.cuda.set_sync_debug_mode(mode)  # an operation that waits is then an error
        try:
            with postponed_checks():
                stats = fused_token_stats(hidden, there[1], there[2], proxy=store, chunk_tokens=16)
                assert stats.proxy_kl is not None
                (found,) = torch.autograd.grad(stats.proxy_kl.sum(), hidden)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return found.cpu()

    torch.testing.assert_close(gradient("cuda", "error"), gradient("cpu", "default"), rtol=1e-3, atol=1e-4)
