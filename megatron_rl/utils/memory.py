"""Where tensors are made that are needed for a moment only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Memory: TypeAlias = Callable[[Tensor, Sequence[int]], Tensor]
"""(like, shape) -> a tensor of that shape, of the other's dtype and device, its values undefined."""


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A `Memory` whose tensors may be kept."""
    return like.new_empty(shape)


class Reused:
    """A `Memory` whose every tensor takes the place of the last: memory that is new costs a CPU more than the copy into
    it."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8)

    def __call__(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * like.element_size()
        if size > self._held.numel() or self._held.device != like.device:
            self._held = like.new_empty(size, dtype=torch.uint8)
        return self._held[:size].view(like.dtype).view(tuple(shape))
