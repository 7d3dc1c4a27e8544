"""The Triton row kernels, run by Triton's interpreter on the CPU, against the definition in fp64.

`test_kernels.py` runs this file in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpreg import fused_token_stats, token_stats
from lpreg.statistics import kernels


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Small blocks, so that a few columns make several blocks and a rest; the interpreter is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.load(), "BLOCK", 64)
        yield


@st.composite
def cases(draw: st.DrawFn) -> dict:
    columns = draw(st.sampled_from([1, 17, 63, 64, 65, 128, 150]))
    return {
        "tokens": draw(st.integers(1, 5)),
        "columns": columns,
        "padding": draw(st.sampled_from([0, 3, 70])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "temperature": draw(st.sampled_from([1.0, 0.7, 1.5])),
        "filter": draw(st.sampled_from([{"min_p": 0.02}, {"min_p": 0.9}, {"fixed_tau": 1 / 200}])),
        "entropy": draw(st.sampled_from(["metric", "grad", "none"])),
        "inplace": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_kernels_match_the_definition_in_values_and_gradients(dense: Callable, case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    tokens, columns, dtype = case["tokens"], case["columns"], case["dtype"]
    logits = (3 * torch.randn(tokens, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (tokens,), generator=generator)
    weights = torch.randn(3, tokens, generator=generator) * (torch.rand(3, tokens, generator=generator) < 0.7)
    shared = {"temperature": case["temperature"], "vocab_size": columns, **case["filter"]}

    whole = logits.double().requires_grad_()
    want = dense(whole, targets, **shared)
    terms = [want.log_probs, want.log_z] + ([want.entropy] if case["entropy"] == "grad" else [])
    (want_grad,) = torch.autograd.grad(sum((w * term).sum() for w, term in zip(weights, terms, strict=False)), whole)

    garbage = torch.full((tokens, case["padding"]), torch.nan, dtype=dtype)
    padded = torch.cat([logits.requires_grad_(), garbage], 1)
    assert kernels.usable(padded)
    got = token_stats(padded, targets, entropy=case["entropy"], inplace_backward=case["inplace"], **shared)
    terms = [got.log_probs, got.log_z] + ([got.entropy] if case["entropy"] == "grad" else [])
    (got_grad,) = torch.autograd.grad(sum((w * term).sum() for w, term in zip(weights, terms, strict=False)), padded)

    assert torch.equal(got.in_filter, want.in_filter)
    for name in ("log_probs", "log_z", "max_logit") + (("entropy",) if case["entropy"] != "none" else ()):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name).detach(), rtol=2e-5, atol=2e-5)
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got_grad[:, :columns].double(), want_grad, rtol=rounding, atol=rounding)
    assert not got_grad[:, columns:].any()
    assert (got_grad.data_ptr() == padded.data_ptr()) == case["inplace"]


@pytest.mark.parametrize("filters", [{"min_p": 0.1}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_entropy_inside_the_filter_is_the_same_with_and_without_kernels(filters: dict) -> None:
    logits = torch.randn(5, 130, generator=torch.Generator().manual_seed(2)) * 3
    targets = torch.arange(5)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = logits.to(dtype).requires_grad_()
        stats = token_stats(leaf, targets, filter_entropy=True, temperature=0.7, **filters)
        assert stats.filter_entropy is not None
        # The last row has no gradient of its entropy, so that a kernel writes it.
        return torch.autograd.grad(stats.filter_entropy[:4].sum() + stats.log_probs.sum(), leaf)[0]

    torch.testing.assert_close(gradient(torch.float32).double(), gradient(torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_an_offset_that_all_logits_share_costs_no_digits(offset: float) -> None:
    logits = (torch.randn(5, 130, generator=torch.Generator().manual_seed(2)) * 48).round() / 16
    targets = torch.arange(5)

    def gradient(x: Tensor) -> Tensor:
        stats = token_stats(x.requires_grad_(), targets, entropy="grad")
        assert stats.entropy is not None
        return torch.autograd.grad((stats.log_probs + stats.log_z + stats.entropy).sum(), x)[0]

    torch.testing.assert_close(gradient(logits + offset).double(), gradient(logits.double()), rtol=1e-5, atol=1e-6)


def test_peaked_rows_keep_their_digits() -> None:
    """log Z near 0 comes from the mass outside the filter, log p of a near-certain token from distances to the top."""
    logits = torch.zeros(1, 150)
    logits[0, 7] = 18.0
    got = token_stats(logits, torch.tensor([7]))
    outside = 149 / (149 + torch.exp(torch.tensor(18.0, dtype=torch.float64)))
    torch.testing.assert_close(got.log_z.double(), torch.log1p(-outside)[None], rtol=1e-5, atol=0)
    # As the log of a sum near 1 it has an absolute error of two of fp32's units at 1, no more.
    torch.testing.assert_close(got.log_probs.double(), torch.log1p(-outside)[None], rtol=0, atol=2.4e-7)


def test_rows_with_one_possible_token() -> None:
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    logits[0, 5:60] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits.requires_grad_()
    got = token_stats(logits, torch.tensor([70, 0]), entropy="grad")
    assert torch.isfinite(got.log_probs).all() and got.entropy is not None and got.entropy[1] == 0
    (gradient,) = torch.autograd.grad((got.log_probs + got.entropy + got.log_z).sum(), logits)
    assert torch.isfinite(gradient).all() and not gradient[0, 5:60].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.zeros(3, 100)
    logits[1, 80] = value
    with pytest.raises(ValueError, match=r"first rows: \[1\]"):
        token_stats(logits, torch.zeros(3, dtype=torch.int64))


STORED = {"some": [True, False, True, False, False, True], "all": [True] * 6, "none": [False] * 6}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("filters", [{}, {"filter_entropy": True}], ids=["plain", "entropy of q"])
@pytest.mark.parametrize("chunk", [None, 4], ids=["logits", "head in chunks"])
def test_a_stored_proxy_gives_the_same_with_and_without_kernels(
    stored: str, filters: dict[str, bool], chunk: int | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    old, new = torch.randn(2, 6, 130, generator=generator) * 3
    targets = torch.randint(130, (6,), generator=generator)
    wanted = torch.tensor(STORED[stored])

    def gradient(dtype: torch.dtype) -> Tensor:
        store = token_stats(old.to(dtype), targets, proxy_rows=wanted).proxy_store
        leaf = new.to(dtype).requires_grad_()
        if chunk is None:
            stats = token_stats(leaf, targets, proxy=store, **filters)
        else:
            identity = torch.eye(130, dtype=dtype)
            stats = fused_token_stats(leaf, identity, targets, proxy=store, chunk_tokens=chunk, **filters)
        assert stats.proxy_kl is not None
        total = stats.proxy_kl + 0.3 * stats.log_probs + 0.2 * stats.log_z
        if stats.filter_entropy is not None:
            total = total + 0.1 * stats.filter_entropy
        return torch.autograd.grad(total.sum(), leaf)[0]

    assert not kernels.usable(new.double()), "fp64 is the torch passes'"
    torch.testing.assert_close(gradient(torch.float32).double(), gradient(torch.float64), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_stored_proxy_is_rounded_once() -> None:
    """With q close to p, p - q of a bf16 gradient would keep no digits if p were rounded first."""
    new = torch.tensor([[2.0, 1.0, 0.0, -1.0, *[-20.0] * 60]])
    targets = torch.tensor([0])
    store = token_stats(new + torch.tensor([0.001] + [0.0] * 63), targets, proxy_rows=torch.tensor([True])).proxy_store
    weight = torch.eye(64, dtype=torch.bfloat16)
    hidden = new.bfloat16().requires_grad_()
    stats = fused_token_stats(hidden, weight, targets, proxy=store)
    assert stats.proxy_kl is not None
    (got,) = torch.autograd.grad(stats.proxy_kl.sum(), hidden)
    leaf = new.double().requires_grad_()
    stats = token_stats(leaf, targets, proxy=store)
    assert stats.proxy_kl is not None
    (expected,) = torch.autograd.grad(stats.proxy_kl.sum(), leaf)
    torch.testing.assert_close(got.double(), expected, rtol=2**-7, atol=1e-9)
