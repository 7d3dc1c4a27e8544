"""The gradient of the LM head's weight, added to a tensor of the caller instead of being returned to autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lpreg import LossInputs, fused_loss, fused_token_stats, make_loss

TOKENS, VOCAB, WIDTH = 30, 20, 6
FORMS = ["fused_token_stats", "fused_loss"]


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), generator=generator)


def loss_of(form: str, hidden: Tensor, weight: Tensor, targets: Tensor, weight_grad: Tensor | None) -> Tensor:
    fields: dict[str, Any] = {"advantages": torch.linspace(-1, 1, TOKENS), "denominator": TOKENS}
    given: dict[str, Any] = {"chunk_tokens": 7, "weight_grad": weight_grad}
    if form == "fused_loss":
        return fused_loss(hidden, weight, targets, make_loss("grpo"), fields, **given)[0].loss
    stats = fused_token_stats(hidden, weight, targets, **given)
    return make_loss("grpo")(LossInputs(log_probs=stats.log_probs, **fields)).loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_is_added_to_weight_grad_and_autograd_gets_none(form: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = head(dtype)
    want_hidden, want = torch.autograd.grad(loss_of(form, hidden, weight, targets, None), [hidden, weight])
    main_grad = torch.ones(VOCAB, WIDTH, dtype=dtype)
    for times in (1, 2):
        hidden.grad = None
        loss_of(form, hidden, weight, targets, main_grad).backward()
        torch.testing.assert_close(main_grad, 1 + times * want)
    torch.testing.assert_close(hidden.grad, want_hidden)
    assert weight.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_bf16_weights_keep_the_digits_of_fp32(form: str) -> None:
    hidden, weight, targets = head(torch.bfloat16)
    exact_hidden, exact_weight = hidden.detach().float(), weight.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(loss_of(form, exact_hidden, exact_weight, targets, None), [exact_weight])
    main_grad = torch.zeros(VOCAB, WIDTH)
    loss_of(form, hidden, weight, targets, main_grad).backward()
    torch.testing.assert_close(main_grad, want, atol=1e-3, rtol=1e-2)  # d logits is bf16
    assert not torch.equal(main_grad, main_grad.bfloat16().float())


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_added_under_no_grad(form: str) -> None:
    hidden, weight, targets = head(torch.float32)
    main_grad = torch.zeros(VOCAB, WIDTH)
    with torch.no_grad():
        loss_of(form, hidden, weight, targets, main_grad)
    assert (main_grad == 0).all()


def test_a_scaled_fused_loss_is_refused_since_its_gradient_was_added_unscaled() -> None:
    loss = loss_of("fused_loss", *head(torch.float32), torch.zeros(VOCAB, WIDTH))
    with pytest.raises(RuntimeError, match="gradient of 1"):
        (2 * loss).backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "weight_grad",
    [torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16), torch.zeros(VOCAB - 1, WIDTH)],
    ids=["dtype", "shape"],
)
def test_a_weight_grad_that_does_not_fit_is_refused(form: str, weight_grad: Tensor) -> None:
    with pytest.raises(ValueError, match=r"weight_grad must be torch.float32 of shape \[20, 6\]"):
        loss_of(form, *head(torch.bfloat16), weight_grad)
