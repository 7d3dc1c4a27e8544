"""token_stats against its definition: values, gradients, filters, padding, dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import token_stats
from lpreg.statistics import shard
from lpreg.statistics.row_statistics import NUCLEUS_TOKENS


def random_case(tokens: int, vocab: int, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * spread
    return logits, torch.randint(vocab, (tokens,), generator=generator)


@st.composite
def cases(draw: st.DrawFn) -> dict:
    vocab = draw(st.integers(1, 40))
    filters = draw(
        st.one_of(
            st.builds(lambda v: {"min_p": v}, st.floats(1e-3, 1.0)),
            # The largest token of a row of 40 has at least 1/40, so that smaller thresholds always keep a token.
            st.builds(lambda v: {"fixed_tau": v}, st.floats(1e-3, 0.0249)),
            st.builds(lambda v: {"top_k": v}, st.integers(1, 45)),
            st.builds(lambda v: {"top_p": v}, st.floats(0.05, 0.999)),
        )
    )
    return {
        "tokens": draw(st.integers(0, 9)),
        "vocab": vocab,
        "padding": draw(st.integers(0, 7)),
        "temperature": draw(st.sampled_from([1.0, 0.6, 1.7])),
        "filters": filters,
        "seed": draw(st.integers(0, 2**31)),
        "work": draw(st.sampled_from([1, 64, 2**18])),
        "entropy": draw(st.sampled_from(["metric", "grad", "none"])),
        "inplace": draw(st.booleans()),
        "some_rows": draw(st.booleans()),
        "filter_entropy": draw(st.booleans()),
    }


@given(cases())
def test_values_and_gradients_match_the_definition(dense: Callable, case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    logits, targets = random_case(case["tokens"], case["vocab"], case["seed"])
    rows = torch.rand(case["tokens"], generator=generator) < (0.4 if case["some_rows"] else 2.0)
    weights = torch.randn(4, case["tokens"], generator=generator, dtype=torch.float64)
    weights *= torch.rand(4, case["tokens"], generator=generator) < 0.7  # rows with one, several or no gradients
    garbage = torch.full((case["tokens"], case["padding"]), torch.nan, dtype=torch.float64)
    shared = {"temperature": case["temperature"], "vocab_size": case["vocab"], **case["filters"]}

    padded = torch.cat([logits, garbage], 1).requires_grad_()
    with mock.patch.object(shard, "CPU_WORK_ELEMENTS", case["work"]):
        got = token_stats(
            padded * 1,
            targets,
            log_z_rows=rows if case["some_rows"] else None,
            entropy=case["entropy"],
            inplace_backward=case["inplace"],
            filter_entropy=case["filter_entropy"],
            **shared,
        )
        loss = (weights[0] * got.log_probs + weights[1] * got.log_z).sum()
        if case["entropy"] == "grad":
            loss = loss + (weights[2] * got.entropy).sum()
        if case["filter_entropy"]:
            loss = loss + (weights[3] * got.filter_entropy).sum()
        loss.backward()

    leaf = logits.clone().requires_grad_()
    want = dense(leaf, targets, **shared)
    loss = (weights[0] * want.log_probs + weights[1] * torch.where(rows, want.log_z, 0)).sum()
    if case["entropy"] == "grad":
        loss = loss + (weights[2] * want.entropy).sum()
    if case["filter_entropy"]:
        loss = loss + (weights[3] * torch.where(rows, want.filter_entropy, 0)).sum()
        torch.testing.assert_close(got.filter_entropy, torch.where(rows, want.filter_entropy, 0))
        torch.testing.assert_close(got.filter_extent, torch.where(rows, want.filter_extent, 0))
    loss.backward()

    torch.testing.assert_close(got.log_probs, want.log_probs)
    torch.testing.assert_close(got.log_z, torch.where(rows, want.log_z, 0).clamp_max(0))
    torch.testing.assert_close(got.max_logit, want.max_logit)
    assert torch.equal(got.in_filter, want.in_filter)
    if case["entropy"] == "none":
        assert got.entropy is None
    else:
        torch.testing.assert_close(got.entropy, want.entropy)
    assert (got.log_z <= 0).all()
    torch.testing.assert_close(padded.grad[:, : case["vocab"]], leaf.grad)
    assert (padded.grad[:, case["vocab"] :] == 0).all()


@pytest.mark.parametrize("filters", [{"min_p": 0.3}, {"fixed_tau": 0.1}, {"top_k": 3}, {"top_p": 0.8}])
def test_gradcheck(filters: dict) -> None:
    logits, targets = random_case(5, 11, spread=1.0)

    def differentiable(x: Tensor) -> tuple[Tensor, ...]:
        stats = token_stats(x, targets, temperature=1.3, entropy="grad", filter_entropy=True, vocab_size=10, **filters)
        assert stats.filter_entropy is not None
        return stats.log_probs, stats.log_z, stats.entropy, stats.filter_entropy

    targets = targets.clamp_max(9)
    assert torch.autograd.gradcheck(differentiable, (logits.requires_grad_(),))


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, 1e6])
def test_an_offset_that_all_logits_share_costs_no_digits(offset: float) -> None:
    """In fp32. The logits are multiples of 1/16, so that the offset itself does not round them."""
    logits, targets = random_case(6, 50)
    logits = (logits * 16).round() / 16
    found = []
    for x in (logits.float() + offset, logits):
        x.requires_grad_()
        stats = token_stats(x, targets, entropy="grad", filter_entropy=True)
        loss = (stats.log_probs + stats.log_z + stats.entropy + stats.filter_entropy).sum()
        found.append([stats.log_probs, stats.log_z, stats.entropy, torch.autograd.grad(loss, x)[0]])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_tokens_that_tie_with_the_last_of_the_likeliest_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, -torch.inf]])
    stats = token_stats(logits, torch.tensor([2]), top_k=2, filter_entropy=True)
    assert bool(stats.in_filter) and stats.log_z.item() == pytest.approx(0.0, abs=1e-6)
    assert stats.filter_extent.item() == pytest.approx(math.log(4) / math.log(5))
    everything = token_stats(logits, torch.tensor([2]), top_k=9, filter_entropy=True)
    assert everything.filter_extent.item() == pytest.approx(math.log(4) / math.log(5))  # not the impossible token


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.9}])
def test_a_row_of_nan_is_refused_with_every_filter(filters: dict) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"first rows: \[1\]"):
        token_stats(logits, torch.zeros(2, dtype=torch.int64), filter_entropy=True, **filters)


def test_a_nucleus_has_a_largest_size() -> None:
    logits = torch.arange(2000.0)[None] * 1e-6
    stats = token_stats(logits, torch.tensor([1999]), top_p=0.99, filter_entropy=True)
    assert stats.filter_extent.item() == pytest.approx(math.log(NUCLEUS_TOKENS) / math.log(2000), rel=2e-2)


def test_minus_log_z_is_the_kl_to_the_frozen_proxy_in_value_and_gradient(dense: Callable) -> None:
    logits, targets = random_case(20, 30)
    want = dense(logits.requires_grad_(), targets)
    kl = (want.q * (want.q.log() - want.log_p).nan_to_num(neginf=0.0)).sum(-1)
    (by_definition,) = torch.autograd.grad(kl.sum(), logits)
    got = token_stats(logits, targets)
    torch.testing.assert_close(-got.log_z, kl)
    (gradient,) = torch.autograd.grad(-got.log_z.sum(), logits)
    torch.testing.assert_close(gradient, by_definition)
    torch.testing.assert_close(gradient, want.p - want.q)


def test_proxy_log_probs_are_those_of_the_renormalised_filter(dense: Callable) -> None:
    logits, targets = random_case(60, 30)
    got = token_stats(logits, targets)
    want = dense(logits, targets)
    assert 0 < got.in_filter.sum() < 60
    torch.testing.assert_close(got.proxy_log_probs, want.q.gather(1, targets[:, None])[:, 0].log())


def test_the_filter_is_applied_after_the_temperature() -> None:
    # 4 below the maximum: outside min_p = 0.02 at T = 1 (log 0.02 = -3.9), inside at T = 2.
    logits, targets = torch.tensor([[0.0, -4.0]]), torch.tensor([1])
    assert not token_stats(logits, targets).in_filter
    assert token_stats(logits, targets, temperature=2.0).in_filter


def test_log_z_keeps_its_digits_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    peaked = torch.randn(200, 500, generator=generator) * 6
    peaked[:, 0] = 25.0
    flat = torch.randn(200, 5000, generator=generator)
    flat[:, 0] = 8.0  # one token has some percent, and the rest is the tail
    for logits in (peaked, flat):
        targets = torch.zeros(200, dtype=torch.int64)
        leaf, exact_leaf = logits.requires_grad_(), logits.detach().double().requires_grad_()
        got, exact = token_stats(leaf, targets), token_stats(exact_leaf, targets)
        torch.testing.assert_close(got.log_z.double(), exact.log_z, rtol=1e-5, atol=0)
        got.log_z.sum().backward()
        exact.log_z.sum().backward()
        torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=1e-4, atol=1e-12)
    assert exact.log_z.mean() < -0.3


def test_large_logits_lose_no_digits() -> None:
    logits, targets = random_case(20, 50)
    logits = (logits * 64).round() / 64  # so that the offset below is exact in fp32
    got = token_stats((logits + 2**14).float(), targets)
    want = token_stats(logits, targets)
    torch.testing.assert_close(got.log_probs.double(), want.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("inplace", [False, True])
def test_lower_precision_logits_are_read_exactly(dtype: torch.dtype, tolerance: float, inplace: bool) -> None:
    logits, targets = random_case(30, 100)
    low = logits.to(dtype).requires_grad_()
    got = token_stats(low * 1, targets, inplace_backward=inplace, vocab_size=100)
    exact_leaf = low.detach().double().requires_grad_()
    exact = token_stats(exact_leaf, targets)
    for name in ("log_probs", "entropy", "log_z", "max_logit"):
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.in_filter, exact.in_filter)
    (got.log_probs - got.log_z).sum().backward()
    (exact.log_probs - exact.log_z).sum().backward()
    assert low.grad.dtype == dtype
    torch.testing.assert_close(low.grad.double(), exact_leaf.grad, rtol=tolerance, atol=tolerance / 10)


def test_log_z_is_zero_without_gradient_in_rows_that_do_not_need_it() -> None:
    logits, targets = random_case(6, 20)
    logits.requires_grad_()
    rows = torch.tensor([True, False, True, False, False, True])
    got = token_stats(logits, targets, log_z_rows=rows)
    assert (got.log_z[~rows] == 0).all() and (got.log_z[rows] < 0).all()
    got.log_z.sum().backward()
    assert (logits.grad[~rows] == 0).all() and (logits.grad[rows] != 0).any(-1).all()
    assert torch.equal(got.in_filter, token_stats(logits, targets).in_filter)


def test_a_fixed_tau_that_keeps_no_token() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    got = token_stats(logits, torch.tensor([1, 0]), fixed_tau=0.3)
    assert got.in_filter.tolist() == [False, True]
    assert got.log_z[0] == -torch.inf and got.log_z[1] < 0
    assert got.proxy_log_probs[0] == -torch.inf
    (gradient,) = torch.autograd.grad((got.log_probs + got.log_z).sum(), logits, retain_graph=True)
    assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(got.log_z.sum(), logits)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).all()


def test_tokens_of_zero_probability_are_allowed() -> None:
    logits, targets = random_case(4, 12)
    banned = torch.zeros(4, 12, dtype=torch.bool)
    banned[:, 3:7] = True
    targets = torch.tensor([0, 1, 2, 3])
    leaf = logits.masked_fill(banned, -torch.inf).requires_grad_()
    got = token_stats(leaf, targets, entropy="grad")
    assert got.log_probs[3] == -torch.inf and not got.in_filter[3]
    short = torch.cat([logits[:, :3], logits[:, 7:]], 1).requires_grad_()
    want = token_stats(short, torch.tensor([0, 1, 2, 0]), entropy="grad")
    torch.testing.assert_close(got.entropy, want.entropy)
    torch.testing.assert_close(got.log_z, want.log_z)
    (got.entropy.sum() + got.log_z.sum() + got.log_probs[:3].sum()).backward()
    (want.entropy.sum() + want.log_z.sum() + want.log_probs[:3].sum()).backward()
    torch.testing.assert_close(leaf.grad[~banned].view(4, -1), short.grad)
    assert (leaf.grad[banned] == 0).all()


def test_only_requested_statistics_are_differentiable() -> None:
    logits, targets = random_case(3, 5)
    got = token_stats(logits.requires_grad_(), targets)
    assert got.log_probs.requires_grad and got.log_z.requires_grad
    assert not got.entropy.requires_grad and not got.max_logit.requires_grad and not got.in_filter.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"min_p": 0.0}, r"min_p must lie in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must lie in \(0, 1\]"),
        ({"fixed_tau": 0.0}, "fixed_tau"),
        ({"entropy": "yes"}, "entropy must be"),
        ({"vocab_size": 6}, "vocab_size is 6, but the logits hold 5 columns on each of 1 ranks"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets\[1\] is 5, outside the vocabulary of 5"),
        ({"targets": torch.tensor([0, 1, -100])}, r"targets\[2\] is -100.*leave out tokens"),
        ({"targets": torch.tensor([0, 4, 1]), "vocab_size": 4}, r"targets\[1\] is 4, outside the vocabulary of 4"),
        ({"targets": torch.tensor([0, 1])}, r"targets must be torch.int64 of shape \[3\]"),
        ({"targets": torch.tensor([0, 1, 2], dtype=torch.int32)}, "targets must be torch.int64"),
        ({"log_z_rows": torch.tensor([1, 0, 1])}, "log_z_rows must be torch.bool"),
        ({"logits": torch.zeros(3)}, "logits must be"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits must be bfloat16"),
        ({"logits": torch.zeros(3, 5, requires_grad=True), "inplace_backward": True}, "leaf"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(3, 5), "targets": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        token_stats(**arguments)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("entropy", ["metric", "none"])
def test_a_logit_that_is_not_finite_is_refused_with_its_row(poison: float, entropy: str) -> None:
    logits, targets = random_case(4, 6)
    logits[2, 5] = poison
    with pytest.raises(ValueError, match=r"1 of 4 rows.*first rows: \[2\]"):
        token_stats(logits, targets, entropy=entropy)


def test_a_row_of_only_minus_infinity_is_refused() -> None:
    logits, targets = random_case(4, 6)
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match=r"first rows: \[1\]"):
        token_stats(logits, targets)
