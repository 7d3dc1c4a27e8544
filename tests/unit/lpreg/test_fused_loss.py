"""fused_loss equals the loss over fused_token_stats in value, metrics and gradients, and refuses losses that chunks
would break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import LossInputs, PolicyLoss, fused_loss, fused_token_stats, make_loss, token_stats
from lpreg.statistics.fused_loss import FROM_THE_MODEL

TOKENS, VOCAB, WIDTH = 30, 20, 6

LOSSES = {
    "grpo": make_loss("grpo"),
    "lp_reg k3": make_loss("lp_reg", min_p=0.1, k3_clamp=0.5),
    "lp_reg full": make_loss("lp_reg", min_p=0.1, kl_estimator="full", beta=0.7),
    "lp_reg fixed": make_loss("lp_reg", fixed_tau=0.02),
    "lp_reg old": make_loss("lp_reg", min_p=0.1, proxy_source="old"),
    "tre": make_loss("tre", coefficient=0.3),
    "tre top-p": make_loss("tre", coefficient=0.3, region="top_p", top_p=0.8),
}


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def given_fields(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Off-policy inputs with some masked tokens and some with advantage 0."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, targets = head(dtype)
    noise = 0.3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    old = token_stats(hidden.detach().double() @ weight.detach().double().T + noise, targets, min_p=0.1)
    advantages = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return {
        "advantages": torch.where(torch.arange(TOKENS) % 4 == 0, 0.0, advantages),
        "old_log_probs": old.log_probs,
        "old_log_z": old.log_z,
        "old_in_filter": old.in_filter,
        "mask": torch.rand(TOKENS, generator=generator) < 0.8,
        "selection": torch.rand(TOKENS, generator=generator) < 0.5,
        "denominator": torch.tensor(23),
    }


def check_equal(loss: PolicyLoss, chunk: int | None, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = head(dtype)
    fields = given_fields(dtype)
    own = loss.token_stats_kwargs()
    stats = fused_token_stats(hidden, weight, targets, log_z_rows=fields["selection"], **own)
    from_model = {name: getattr(stats, name) for name in FROM_THE_MODEL}
    inputs = LossInputs(**from_model, **fields)
    want = loss(inputs)
    want_grads = torch.autograd.grad(3 * want.loss, [hidden, weight])

    got, got_stats = fused_loss(
        hidden, weight, targets, loss, fields, chunk_tokens=chunk, log_z_rows=fields["selection"]
    )
    got_grads = torch.autograd.grad(3 * got.loss, [hidden, weight])
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-6)
    for name in ("log_probs", "entropy", "log_z", "in_filter", "max_logit"):
        torch.testing.assert_close(getattr(got_stats, name), getattr(stats, name).detach(), rtol=1e-5, atol=1e-5)
    assert got.metrics.keys() == want.metrics.keys()
    for name, mean in want.metrics.items():
        assert got.metrics[name].value == pytest.approx(mean.value, rel=1e-5, nan_ok=True), name
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert got_grad.dtype == dtype
        scale = float(want_grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(got_grad, want_grad, rtol=tolerance, atol=tolerance * scale)


@given(name=st.sampled_from(sorted(LOSSES)), chunk=st.none() | st.integers(1, TOKENS + 1))
def test_both_fused_forms_agree_in_fp64(name: str, chunk: int | None) -> None:
    check_equal(LOSSES[name], chunk, torch.float64, 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", LOSSES)
def test_both_fused_forms_agree_in_lower_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    check_equal(LOSSES[name], 7, dtype, tolerance)


class EntropyBonus(PolicyLoss):
    """The smallest loss with a gradient through the entropy."""

    name = "bonus"

    def token_stats_kwargs(self) -> Any:
        return {"entropy": "grad"}

    def __call__(self, inputs: LossInputs) -> Any:
        assert inputs.entropy is not None
        loss = -(inputs.advantages * inputs.log_probs + 0.1 * inputs.entropy).sum() / inputs.denominator
        return type(make_loss("grpo")(inputs))(loss, {})


def test_a_loss_that_needs_it_gets_the_gradient_of_the_entropy() -> None:
    hidden, weight, targets = head()
    advantages = given_fields()["advantages"]
    output, _ = fused_loss(
        hidden, weight, targets, EntropyBonus(None), {"advantages": advantages, "denominator": 9}, chunk_tokens=4
    )
    log_p = (hidden @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    want = -(advantages * log_p[torch.arange(TOKENS), targets] + 0.1 * entropy).sum() / 9
    for got, by_hand in zip(
        torch.autograd.grad(output.loss, [hidden, weight]), torch.autograd.grad(want, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(got, by_hand)


def test_an_empty_micro_batch_gives_zero_loss_and_gradient() -> None:
    hidden, weight, targets = head()
    fields = {"advantages": torch.zeros(0, dtype=torch.float64), "denominator": 5}
    empty = hidden[:0]
    output, stats = fused_loss(empty, weight, targets[:0], LOSSES["grpo"], fields)
    output.loss.backward()
    assert output.loss == 0 and stats.log_probs.shape == (0,) and (weight.grad == 0).all()


def test_no_gradients_are_computed_under_no_grad() -> None:
    hidden, weight, targets = head()
    fields = given_fields()
    with torch.no_grad():
        output, _ = fused_loss(hidden, weight, targets, LOSSES["grpo"], fields)
    assert not output.loss.requires_grad
    want, _ = fused_loss(hidden, weight, targets, LOSSES["grpo"], fields)
    assert torch.equal(output.loss, want.loss)
    alone, _ = fused_loss(hidden, weight.detach(), targets, LOSSES["grpo"], fields)
    assert torch.equal(*(torch.autograd.grad(loss.loss, hidden)[0] for loss in (alone, want)))


def test_a_second_backward_is_an_error() -> None:
    hidden, weight, targets = head()
    output, _ = fused_loss(hidden, weight, targets, LOSSES["grpo"], given_fields())
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.loss.backward()


class NotSeparable(EntropyBonus):
    name = "whole"
    token_separable = False


@pytest.mark.parametrize(
    ("change", "loss", "message"),
    [
        ({}, NotSeparable(None), "whole as set up looks at more than one token.*use fused_token_stats"),
        ({"sequence_ids": torch.zeros(TOKENS)}, make_loss("gspo"), "gspo as set up looks at more than one token"),
        ({}, make_loss("lp_reg", selection_scope="micro_batch_negatives"), "lp_reg as set up looks at more than one"),
        ({"log_probs": torch.zeros(TOKENS)}, LOSSES["grpo"], r"inputs\['log_probs'\] comes from the model"),
        ({"advantage": torch.zeros(TOKENS)}, LOSSES["grpo"], r"inputs\['advantage'\] is not a field of LossInputs"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, LOSSES["grpo"], r"inputs\['mask'\] must have shape \[30\].*\[4\]"),
    ],
)
def test_losses_and_inputs_that_chunks_would_break_are_refused(
    change: dict[str, Any], loss: PolicyLoss, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fused_loss(*head(), loss, given_fields() | change)


def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_batch() -> None:
    hidden, weight, targets = head()
    hidden.data[17, 2] = torch.inf
    with pytest.raises(ValueError, match=r"first rows: \[17\]"):
        fused_loss(hidden, weight, targets, LOSSES["grpo"], given_fields(), chunk_tokens=4)


def test_a_counted_value_that_is_not_finite_is_named_by_its_place_in_the_call() -> None:
    hidden, weight, targets = head()
    fields = given_fields() | {"mask": torch.ones(TOKENS, dtype=torch.bool)}
    fields["advantages"][TOKENS - 1] = torch.nan
    with pytest.raises(ValueError, match=rf"advantages\[{TOKENS - 1}\] is nan"):
        fused_loss(hidden, weight, targets, LOSSES["grpo"], fields, chunk_tokens=3)
    fields["mask"][TOKENS - 1] = False
    fused_loss(hidden, weight, targets, LOSSES["grpo"], fields, chunk_tokens=3)
