"""The memory of token_stats: work buffers instead of copies, gradients over the logits, idle rows that are not read."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpreg import token_stats
from lpreg.statistics import shard

TOKENS, VOCAB = 64, 100


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation made, except in the given storages."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaf = (torch.randn(TOKENS, VOCAB, generator=generator) * 3).to(dtype).requires_grad_()
    return leaf, leaf * 1, torch.randint(VOCAB, (TOKENS,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_never_copied_as_a_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "CPU_WORK_ELEMENTS", 4 * VOCAB)
    _, logits, targets = case(dtype)
    weights = torch.ones(TOKENS)
    weights[::3] = 0
    with LargestTensor(logits) as seen:
        stats = token_stats(logits, targets, inplace_backward=True, entropy="grad")
        loss = (weights * (stats.log_probs + stats.log_z + stats.entropy)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert seen.elements <= 4 * VOCAB


def test_the_in_place_gradient_equals_the_gradient() -> None:
    leaf, logits, targets = case()
    stats = token_stats(logits, targets)
    (stats.log_probs + stats.log_z).sum().backward()
    separate = leaf.grad.clone()
    assert torch.equal(logits, leaf), "without inplace_backward the logits stay as they are"
    leaf.grad = None
    stats = token_stats(leaf * 1, targets, inplace_backward=True)
    (stats.log_probs + stats.log_z).sum().backward()
    assert torch.equal(leaf.grad, separate)


def test_a_second_backward_over_overwritten_logits_is_an_error() -> None:
    _, logits, targets = case()
    loss = token_stats(logits, targets, inplace_backward=True).log_probs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_without_gradient_are_set_to_zero_without_being_read() -> None:
    _, logits, targets = case()
    stats = token_stats(logits, targets)
    idle = torch.zeros(TOKENS, dtype=torch.bool)
    idle[10:30] = idle[-1] = True
    logits.data[idle] = torch.nan  # .data: behind autograd's back
    (gradient,) = torch.autograd.grad(torch.where(idle, 0, stats.log_probs + stats.log_z).sum(), logits)
    assert (gradient[idle] == 0).all()
    assert gradient.isfinite().all() and (gradient[~idle] != 0).any(-1).all()


def test_a_loss_does_not_keep_the_logits_alive() -> None:
    class Memory(bytearray):
        """Memory of a tensor that weak references can watch."""

    class Model(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
            return logits.view_as(logits)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad.sum(), None

    memory = Memory(4 * TOKENS * VOCAB)
    logits = torch.frombuffer(memory, dtype=torch.float32).view(TOKENS, VOCAB)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    loss = token_stats(Model.apply(torch.ones((), requires_grad=True), logits), targets).log_probs.sum()
    alive = weakref.ref(memory)
    del memory, logits
    assert alive() is not None
    loss.backward()
    assert alive() is None
    assert loss.isfinite()
