"""Tensors in portions: large enough to travel well, small enough that no process ever holds a whole model twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_rl.utils.memory import Memory, fresh

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its values."""

    name: str
    dtype: str
    """As torch calls it: float32, bfloat16."""
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * getattr(torch, self.dtype).itemsize


def bucket_specs(specs: Iterable[TensorSpec], limit_bytes: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """In their order, each bucket of one type and at most `limit_bytes`, but for a tensor that is larger by itself."""
    buckets: list[list[TensorSpec]] = []
    for opens, spec in _openings(specs, lambda spec: (spec.nbytes, spec.dtype), limit_bytes):
        if opens:
            buckets.append([])
        buckets[-1].append(spec)
    return tuple(tuple(bucket) for bucket in buckets)


def bucketed(tensors: Iterable[tuple[str, Tensor]], limit_bytes: int) -> Iterator[tuple[bool, Tensor]]:
    """Whether one of these buckets begins, and the tensor that comes next."""
    pairs = _openings(tensors, lambda pair: (pair[1].nbytes, pair[1].dtype), limit_bytes)
    return ((opens, tensor) for opens, (_, tensor) in pairs)


def flattened(tensors: Iterable[tuple[str, Tensor]], limit_bytes: int, memory: Memory = fresh) -> Iterator[Tensor]:
    """The same buckets as [bytes], uint8: tensors one behind the other, each of which may change when the next one is
    drawn. They are in `memory`."""
    flat, filled = None, 0
    for opens, tensor in bucketed(tensors, limit_bytes):
        if opens:
            if flat is not None:
                yield flat[:filled]
            bytes_like = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            flat, filled = memory(bytes_like, (max(limit_bytes, tensor.nbytes),)), 0
        assert flat is not None
        end = filled + tensor.nbytes
        flat[filled:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        filled = end
    if flat is not None:
        yield flat[:filled]


def _openings(
    items: Iterable[T], size_and_type: Callable[[T], tuple[int, object]], limit: int
) -> Iterator[tuple[bool, T]]:
    """Each, and whether a bucket begins with it."""
    held, kind = 0, None
    for item in items:
        size, own_kind = size_and_type(item)
        opens = own_kind != kind or held + size > limit
        yield opens, item
        held, kind = size if opens else held + size, own_kind


def unflatten(flat: Tensor, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a flattened bucket: views of it."""
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        yield spec.name, flat[start:end].view(getattr(torch, spec.dtype)).reshape(spec.shape)
        start = end
