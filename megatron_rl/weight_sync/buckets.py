"""Buckets of tensors: large enough to send efficiently, small enough that no process holds a model twice."""

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
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: str
    """torch's name of the dtype: float32, bfloat16, ..."""
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
    """Group tensors into buckets in order.

    A bucket has one dtype and at most `limit_bytes`, or one larger tensor.
    """
    buckets: list[list[TensorSpec]] = []
    for opens, spec in _openings(specs, lambda spec: (spec.nbytes, spec.dtype), limit_bytes):
        if opens:
            buckets.append([])
        buckets[-1].append(spec)
    return tuple(tuple(bucket) for bucket in buckets)


def bucketed(tensors: Iterable[tuple[str, Tensor]], limit_bytes: int) -> Iterator[tuple[bool, str, Tensor]]:
    """Yields each tensor with whether it opens a new bucket, and its name, for the buckets of `bucket_specs`."""
    pairs = _openings(tensors, lambda pair: (pair[1].nbytes, pair[1].dtype), limit_bytes)
    return ((opens, name, tensor) for opens, (name, tensor) in pairs)


def flattened(tensors: Iterable[tuple[str, Tensor]], limit_bytes: int, memory: Memory = fresh) -> Iterator[Tensor]:
    """Yields the buckets of `bucket_specs` as flat uint8 tensors [bytes], made with `memory`.

    A tensor from `tensors` may change once the next one is drawn.
    """
    flat, filled = None, 0
    for opens, _, tensor in bucketed(tensors, limit_bytes):
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
    """Yields each item with whether it opens a new bucket."""
    held, kind = 0, None
    for item in items:
        size, own_kind = size_and_type(item)
        opens = own_kind != kind or held + size > limit
        yield opens, item
        held, kind = size if opens else held + size, own_kind


def unflatten(flat: Tensor, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """Yields the named tensors of a flat bucket, as views of it."""
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        yield spec.name, flat[start:end].view(getattr(torch, spec.dtype)).reshape(spec.shape)
        start = end
