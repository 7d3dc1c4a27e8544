"""The kernels that step many tensors at once."""

from __future__ import annotations

import torch
from torch import Tensor

Lists = list[list[Tensor]]


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: Lists, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: Tensor, lists: Lists, scale: Tensor) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Steps (gradients, weights, first moments, second moments) by AdamW, which is mode 1."""
    if mode != 1 or len(lists) != 4:
        raise NotImplementedError("Adam with L2 regularisation or with separate main weights has no stand-in")
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, weight, mean, square in zip(*lists, strict=True):
        grad, before = grad.float(), weight.float()
        mean.copy_(mean * beta1 + grad * (1 - beta1))
        square.copy_(square * beta2 + grad * grad * (1 - beta2))
        update = (mean / first) / ((square / second).sqrt() + eps) + weight_decay * before
        weight.copy_(before - lr * update)
