"""The fused forms never hold [T, V], reuse one chunk of logits, and do not touch rows without gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpreg import LossInputs, fused_loss, fused_token_stats, make_loss

# A [T, V] tensor would be much larger than [T, d], [V, d] and a chunk [CHUNK, V].
TOKENS, VOCAB, WIDTH, CHUNK = 200, 300, 4, 5
Run = Any


class Watch(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation made, and the rows of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        return result


def recompute(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    stats = fused_token_stats(hidden, weight, targets, chunk_tokens=CHUNK)
    return make_loss("grpo")(
        LossInputs(log_probs=stats.log_probs, advantages=advantages.to(stats.log_probs.dtype), denominator=TOKENS)
    ).loss


def in_forward(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> Tensor:
    fields = {"advantages": advantages, "denominator": TOKENS}
    return fused_loss(hidden, weight, targets, make_loss("grpo"), fields, chunk_tokens=CHUNK)[0].loss


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (TOKENS,), generator=generator), torch.randn(TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [recompute, in_forward])
def test_no_tensor_of_the_size_of_the_logits_is_made(form: Run, dtype: torch.dtype) -> None:
    hidden, weight, targets, advantages = case(dtype)
    with Watch() as seen:
        form(hidden, weight, targets, advantages).backward()
    # The largest is a chunk of logits, or the weight and its gradient.
    assert CHUNK * VOCAB == 1500 and VOCAB * WIDTH == 1200
    assert seen.elements == CHUNK * VOCAB


@pytest.mark.parametrize(("form", "products"), [(recompute, 4), (in_forward, 3)])
def test_the_number_of_matrix_products_is_as_documented(form: Run, products: int) -> None:
    hidden, weight, targets, advantages = case()
    with Watch() as seen:
        form(hidden, weight, targets, advantages).backward()
    assert seen.products == products * TOKENS * VOCAB * WIDTH


@pytest.mark.parametrize(("form", "spared"), [(recompute, 3), (in_forward, 2)])
def test_rows_without_gradient_cost_no_product_in_the_backward(form: Run, spared: int) -> None:
    hidden, weight, targets, advantages = case()
    idle = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    idle[:CHUNK] = True  # a complete chunk
    advantages = torch.where(idle, 0.0, advantages)
    with Watch() as seen:
        form(hidden, weight, targets, advantages).backward()
    products = 4 if form is recompute else 3
    assert seen.products == (products * TOKENS - spared * int(idle.sum())) * VOCAB * WIDTH
    assert (hidden.grad[idle] == 0).all() and (hidden.grad[~idle] != 0).any(-1).all()

    dense = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad(-(advantages * dense).sum() / TOKENS, [hidden, weight])
    torch.testing.assert_close(hidden.grad, want[0])
    torch.testing.assert_close(weight.grad, want[1])


def test_log_z_of_some_rows_costs_no_product_on_one_rank() -> None:
    hidden, weight, targets, _ = case()
    for rows in (None, torch.zeros(TOKENS, dtype=torch.bool), torch.arange(TOKENS) % 7 == 0):
        with Watch() as seen, torch.no_grad():
            fused_token_stats(hidden, weight, targets, chunk_tokens=CHUNK, log_z_rows=rows)
        assert seen.products == TOKENS * VOCAB * WIDTH
