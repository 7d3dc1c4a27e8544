"""Copies of GPU tensors in host memory, which keep their place from one copy to the next."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: each copy starts at a multiple of this."""
PAGE = 4096
"""Bytes: memory is pinned in whole pages."""


Key = TypeVar("Key", bound=Hashable)


class HostCopies(Generic[Key]):
    """Host copies of tensors under keys. A second copy under a key overwrites the first one, in the same memory.

    The memory is pinned if the tensors are on a GPU, so that copies are as fast as the bus. It is registered with CUDA
    rather than taken from torch's pinned allocator, which rounds each size up to a power of two.
    """

    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}
        self._pinned: list[Tensor] = []
        weakref.finalize(self, _unpin, self._pinned)

    def copy(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Returns the host copies. Tensors with new keys get one buffer together, of the size that they need."""
        new = {key: tensor for key, tensor in tensors.items() if not _fits(self._held.get(key), tensor)}
        if new:
            self._allocate(new)
        return {key: self._held[key].copy_(tensor) for key, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def _allocate(self, tensors: Mapping[Key, Tensor]) -> None:
        sizes = {key: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for key, tensor in tensors.items()}
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        buffer = _buffer(sum(sizes.values()), self._pinned if on_gpu else None)
        start = 0
        for key, tensor in tensors.items():
            part = buffer[start : start + tensor.nbytes]
            self._held[key] = part.view(tensor.dtype).view(tensor.shape)
            start += sizes[key]


def _fits(held: Tensor | None, tensor: Tensor) -> bool:
    return held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype


def _buffer(nbytes: int, pinned: list[Tensor] | None) -> Tensor:
    """Returns host memory. Pinned memory starts and ends at page borders, and is added to the list."""
    if pinned is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    size = -(-nbytes // PAGE) * PAGE
    whole = torch.empty(size + PAGE, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    buffer = whole[first : first + size]
    status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    if status:
        warnings.warn(
            f"CUDA cannot pin {size / 2**30:.1f} GiB of host memory (error {status}), so copies from and to the GPU "
            "take longer. A container may limit locked memory: see `ulimit -l`",
            stacklevel=2,
        )
    else:
        pinned.append(buffer)
    return buffer


def _unpin(pinned: list[Tensor]) -> None:
    for buffer in pinned:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
