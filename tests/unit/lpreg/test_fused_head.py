"""fused_token_stats is token_stats of hidden @ weight.T: values, gradients, padding, dtypes, in chunks of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import TokenStats, fused_token_stats, token_stats

FLOATS = ("log_probs", "entropy", "log_z", "max_logit")


def random_case(
    tokens: int, vocab: int, width: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden, weight and targets whose logits are spread enough for the filter to matter."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * 1.3
    targets = torch.randint(vocab, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def weighted(stats: TokenStats, weights: Tensor) -> Tensor:
    loss = (weights[0] * stats.log_probs + weights[1] * stats.log_z).sum()
    if stats.entropy is not None and stats.entropy.requires_grad:
        loss = loss + (weights[2] * stats.entropy).sum()
    return loss


cases = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 12),
        "vocab": st.integers(1, 40),
        "padding": st.integers(0, 6),
        "seed": st.integers(0, 2**16),
        "chunk": st.none() | st.integers(1, 14),
        "temperature": st.sampled_from([1.0, 0.7, 2.0]),
        "filters": st.sampled_from([{}, {"min_p": 0.3}, {"fixed_tau": 0.02}]),
        "some_rows": st.booleans(),
        "entropy": st.sampled_from(["metric", "grad", "none"]),
    }
)


@given(cases)
def test_equals_token_stats_and_dense_autograd(dense: Callable, case: dict[str, Any]) -> None:
    hidden, true_weight, targets = random_case(case["tokens"], case["vocab"], seed=case["seed"])
    generator = torch.Generator().manual_seed(case["seed"])
    rows = torch.rand(case["tokens"], generator=generator) < 0.4
    weights = torch.randn(3, case["tokens"], generator=generator, dtype=torch.float64)
    weights *= torch.rand(3, case["tokens"], generator=generator) < 0.6  # rows with one, several or no gradients
    log_z_rows = rows if case["some_rows"] else None
    shared = {"temperature": case["temperature"], "vocab_size": case["vocab"], **case["filters"]}

    garbage = torch.full((case["padding"], 5), torch.nan, dtype=torch.float64)
    weight = torch.cat([true_weight.detach(), garbage]).requires_grad_()
    settings = {**shared, "log_z_rows": log_z_rows, "entropy": case["entropy"]}
    got = fused_token_stats(hidden, weight, targets, chunk_tokens=case["chunk"], **settings)
    d_hidden, d_weight = torch.autograd.grad(weighted(got, weights), [hidden, weight])

    materialised = token_stats(hidden @ true_weight.T, targets, **settings)
    want_hidden, want_weight = torch.autograd.grad(weighted(materialised, weights), [hidden, true_weight])
    assert torch.equal(got.in_filter, materialised.in_filter)
    for name in FLOATS:
        torch.testing.assert_close(getattr(got, name), getattr(materialised, name), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(d_hidden, want_hidden, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(d_weight[: case["vocab"]], want_weight, rtol=1e-10, atol=1e-10)
    assert (d_weight[case["vocab"] :] == 0).all()

    plain = dense(hidden @ true_weight.T, targets, **shared)
    log_z = plain.log_z if log_z_rows is None else torch.where(rows, plain.log_z, 0)
    finite = torch.where(log_z == -torch.inf, 0, log_z)
    loss = (weights[0] * plain.log_probs + weights[1] * finite).sum()
    if case["entropy"] == "grad":
        loss = loss + (weights[2] * plain.entropy).sum()
    by_autograd = torch.autograd.grad(loss, [hidden, true_weight])
    if torch.isfinite(log_z).all():  # autograd makes a NaN of the log of a mass that is 0
        torch.testing.assert_close(d_hidden, by_autograd[0])
        torch.testing.assert_close(d_weight[: case["vocab"]], by_autograd[1])


@pytest.mark.parametrize("filters", [{"min_p": 0.3}, {"fixed_tau": 0.1}])
def test_gradcheck_through_the_head(filters: dict[str, float]) -> None:
    hidden, weight, targets = random_case(5, 11, width=3)

    def differentiable(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        stats = fused_token_stats(
            hidden,
            weight,
            targets.clamp_max(9),
            chunk_tokens=2,
            temperature=1.3,
            entropy="grad",
            vocab_size=10,
            **filters,
        )
        return stats.log_probs, stats.log_z, stats.entropy

    assert torch.autograd.gradcheck(differentiable, (hidden, weight))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_lower_precision_weights_give_fp32_logits(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = random_case(40, 60, dtype=dtype)
    got = fused_token_stats(hidden, weight, targets, chunk_tokens=7)
    exact_hidden, exact_weight = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    exact = token_stats(exact_hidden @ exact_weight.T, targets)
    for name in FLOATS:
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(got.in_filter, exact.in_filter)
    (got.log_probs - got.log_z).sum().backward()
    (exact.log_probs - exact.log_z).sum().backward()
    for leaf, exact_leaf in ((hidden, exact_hidden), (weight, exact_weight)):
        assert leaf.grad.dtype == dtype
        scale = float(exact_leaf.grad.abs().max())
        torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, rtol=tolerance, atol=tolerance * scale)


def test_the_gradient_of_the_weight_is_summed_in_fp32() -> None:
    """Each chunk adds a half: a bf16 sum would stop growing at 128."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    stats = fused_token_stats(hidden, weight, torch.zeros(1024, dtype=torch.int64), chunk_tokens=1)
    stats.log_probs.sum().backward()
    assert weight.grad.tolist() == [[512.0], [-512.0]]


def test_only_inputs_that_require_gradients_get_them() -> None:
    hidden, weight, targets = random_case(6, 9)
    both = torch.autograd.grad(fused_token_stats(hidden, weight, targets).log_probs.sum(), [hidden, weight])
    for place, inputs in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        (alone,) = torch.autograd.grad(fused_token_stats(*inputs, targets).log_probs.sum(), [inputs[place]])
        assert torch.equal(alone, both[place])
    stats = fused_token_stats(hidden, weight, targets)
    assert not stats.entropy.requires_grad and not stats.max_logit.requires_grad and not stats.in_filter.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[tokens, width\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be bfloat16"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[vocabulary slice, 4\]"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float64)}, "weight must be torch.float32 on cpu to fit hidden"),
        ({"chunk_tokens": 0}, "chunk_tokens must be None or at least 1, got 0"),
        (
            {"targets": torch.tensor([0, 1])},
            r"targets must be torch.int64 of shape \[3\] on cpu to fit the hidden states",
        ),
        ({"targets": torch.tensor([0, 1, 5])}, r"targets\[2\] is 5, outside the vocabulary of 5"),
        ({"log_z_rows": torch.ones(2, dtype=torch.bool)}, "log_z_rows must be torch.bool of shape"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"vocab_size": 6}, "vocab_size is 6"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        fused_token_stats(**arguments)


def test_a_hidden_state_that_is_not_finite_is_refused_with_its_row() -> None:
    hidden, weight, targets = random_case(8, 6)
    hidden.data[5, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 8 rows.*first rows: \[5\]"):
        fused_token_stats(hidden, weight, targets, chunk_tokens=2)
