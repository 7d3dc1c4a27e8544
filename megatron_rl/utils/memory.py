"""Allocation of temporary tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Memory: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]
"""(like, shape) -> an uninitialised tensor of that shape, with the dtype and device of `like`."""


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A `Memory` that allocates each tensor anew, so that callers may keep the tensors."""
    return like.new_empty(shape)


class Reused:
    """A `Memory` whose tensors all share one buffer: each tensor overwrites the previous one.

    On a CPU, allocating new memory costs more than copying into it.
    """

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)

    def __call__(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * like.element_size()
        if size > self._held.numel() or self._held.device != like.device:
            self._held = like.new_empty(size, dtype=torch.uint8)
        return self._held[:size].view(like.dtype).view(tuple(shape))


class Alternating:
    """A `Memory` with two buffers in turns: each tensor overwrites the one before the previous one."""

    def __init__(self) -> None:
        self._buffers = Reused(), Reused()

    def __call__(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        self._buffers = self._buffers[1], self._buffers[0]
        return self._buffers[0](like, shape)
