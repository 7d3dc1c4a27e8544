"""Tensors in portions: large enough to travel well, small enough that no process ever holds a whole model twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

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


def bucketed(tensors: Iterable[tuple[str, Tensor]], limit_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """In their order, each bucket of one type and at most `limit_bytes`, but for a tensor that is larger by itself."""
    return _portions(tensors, lambda pair: (pair[1].nbytes, pair[1].dtype), limit_bytes)


def bucket_specs(specs: Iterable[TensorSpec], limit_bytes: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """How `bucketed` will portion these tensors."""
    return tuple(tuple(part) for part in _portions(specs, lambda spec: (spec.nbytes, spec.dtype), limit_bytes))


def _portions(items: Iterable[T], size_and_type: Callable[[T], tuple[int, object]], limit: int) -> Iterator[list[T]]:
    portion: list[T] = []
    held, kind = 0, None
    for item in items:
        size, own_kind = size_and_type(item)
        if portion and (held + size > limit or own_kind != kind):
            yield portion
            portion, held = [], 0
        portion.append(item)
        held, kind = held + size, own_kind
    if portion:
        yield portion


def flatten(bucket: list[tuple[str, Tensor]], into: Tensor | None = None) -> Tensor:
    """[bytes], uint8: the tensors one behind the other; at the beginning of `into` where they fit there."""
    pieces = [tensor.contiguous().reshape(-1).view(torch.uint8) for _, tensor in bucket]
    total = sum(piece.numel() for piece in pieces)
    fits = into is not None and total <= into.numel()
    return torch.cat(pieces, out=into[:total] if fits and into is not None else None)


def unflatten(flat: Tensor, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `flatten`: views of `flat`."""
    start = 0
    for spec in specs:
        end = start + spec.nbytes
        yield spec.name, flat[start:end].view(getattr(torch, spec.dtype)).reshape(spec.shape)
        start = end
