"""What stands behind the mask reaches neither loss nor gradient, and a counted value that is not finite is named."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import LossInputs, LossOutput, PolicyLoss, make_loss, with_correction, with_lp_reg, with_reference_kl
from lpreg.losses.inputs import FINITE, MAY_BE_MINUS_INFINITY
from tests.dense_methods import DEFINITIONS
from tests.tiers import fewer_examples

TOKENS = 24
LOSSES: dict[str, PolicyLoss] = {name: loss for name, (loss, _) in DEFINITIONS.items()} | {
    "reference": with_reference_kl(make_loss("grpo"), coefficient=0.3),
    "reference, k1": with_reference_kl(make_loss("dppo"), coefficient=0.3, estimator="k1"),
    "corrected": with_correction(with_lp_reg(make_loss("sapo")), weights="truncated"),
    "corrected, rejected": with_correction(make_loss("gspo"), weights="masked", reject_sequences=True),
}
GARBAGE = [math.nan, math.inf, -math.inf, -1e4, 1e30, 0.0]
FLAGS = ("in_filter", "old_in_filter", "selection")


def fields(seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every field of LossInputs; tokens that the model's statistics belong to have gradients."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(high: float = 0.0) -> Tensor:
        return high - torch.rand(TOKENS, generator=generator, dtype=torch.float64).to(dtype) * 3

    old = numbers()
    near = old + 0.3 * torch.randn(TOKENS, generator=generator, dtype=torch.float64).to(dtype)
    floats = {
        "log_probs": near.clamp(max=-1e-3),
        "old_log_probs": old,
        "advantages": torch.randn(TOKENS, generator=generator).to(dtype).round(decimals=1),
        "entropy": numbers(3.0),
        "entropy_coefficient": torch.full((TOKENS,), 0.1, dtype=dtype),
        "filter_entropy": numbers(3.0),
        "filter_extent": numbers(3.0) / 3,
        "log_z": numbers() / 9,
        "old_log_z": numbers() / 9,
        "proxy_log_probs": old + 0.2,
        "proxy_kl": numbers(3.0),
        "reference_log_probs": numbers(),
        "rollout_log_probs": old + 0.01,
    }
    flags = {name: torch.rand(TOKENS, generator=generator) < 0.6 for name in FLAGS}
    ids = torch.arange(TOKENS) // 5
    return {**floats, **flags, "sequence_ids": ids, "denominator": 7}


def outcome(loss: PolicyLoss, given_fields: dict[str, Any]) -> tuple[LossOutput, list[Tensor]]:
    """The output of the loss, and the gradients of the statistics of the policy in training."""
    names = ("log_probs", "entropy", "filter_entropy", "log_z", "proxy_kl")
    leaves = {name: given_fields[name].clone().requires_grad_() for name in names}
    output = loss(LossInputs(**given_fields | leaves))
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), allow_unused=True)
    return output, [torch.zeros(TOKENS) if gradient is None else gradient for gradient in gradients]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool((a.isnan() & b.isnan()).all())


@fewer_examples(4)
@given(data=st.data())
@pytest.mark.parametrize("name", LOSSES)
def test_garbage_behind_the_mask_changes_nothing(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    clean = fields(data.draw(st.integers(0, 99)), dtype)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS)))
    dirty = dict(clean)
    for field, value in clean.items():
        if not isinstance(value, Tensor) or field == "sequence_ids":
            continue
        garbage = [True, False] if field in FLAGS else GARBAGE
        drawn = torch.tensor(data.draw(st.lists(st.sampled_from(garbage), min_size=TOKENS, max_size=TOKENS)))
        dirty[field] = torch.where(mask, value, drawn.to(value.dtype))
    want, want_gradients = outcome(LOSSES[name], {**clean, "mask": mask})
    got, got_gradients = outcome(LOSSES[name], {**dirty, "mask": mask})
    assert same_bits(got.loss, want.loss)
    for gradient, expected in zip(got_gradients, want_gradients, strict=True):
        assert torch.equal(gradient, expected) and not gradient[~mask].any()
    for metric, mean in want.metrics.items():
        assert same_bits(got.metrics[metric].total, mean.total), metric


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", [*FINITE, *MAY_BE_MINUS_INFINITY])
def test_a_counted_value_that_is_not_finite_is_named(field: str, value: float) -> None:
    given_fields = fields(0, torch.float32)
    given_fields[field][[5, 9]] = value
    if field in MAY_BE_MINUS_INFINITY and value == -math.inf:
        LossInputs(**given_fields)
        return
    with pytest.raises(ValueError, match=rf"^{field}\[5\] is {value}, the first of 2 such values"):
        LossInputs(**given_fields)
    LossInputs(**given_fields, mask=~torch.isin(torch.arange(TOKENS), torch.tensor([5, 9])))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [100.0, 1e4, -100.0, -1e4])
def test_log_ratios_beyond_fp32_keep_the_gradient_finite(name: str, gap: float) -> None:
    given_fields = fields(1, torch.float32)
    given_fields["log_probs"] += min(gap, 0.0)  # a log-prob is never above 0
    for field in ("old_log_probs", "proxy_log_probs", "reference_log_probs"):
        given_fields[field] = given_fields["log_probs"] - gap
    given_fields["rollout_log_probs"] = given_fields["old_log_probs"]
    output, gradients = outcome(LOSSES[name], given_fields)
    assert output.loss.isfinite()
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_a_ratio_within_the_bound_is_not_changed() -> None:
    inputs = LossInputs(log_probs=torch.tensor([-1.0]), advantages=torch.ones(1), denominator=1)
    for gap in (-19.0, 0.5, 19.0):
        ratio = replace(inputs, old_log_probs=torch.tensor([-1.0 - gap])).ratio
        assert ratio.item() == torch.tensor(gap).exp().item()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_does_not_overflow(name: str) -> None:
    """A ratio of exp(12) is beyond the largest float16, and so may be a true gradient, which is then infinite."""
    far = fields(0, torch.float32) | {
        "log_probs": torch.full((TOKENS,), -1.0),
        "old_log_probs": torch.full((TOKENS,), -13.0),
    }
    half = {
        name: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in far.items()
    }
    output, gradients = outcome(LOSSES[name], half)
    assert output.loss.isfinite() and not any(gradient.isnan().any() for gradient in gradients)
