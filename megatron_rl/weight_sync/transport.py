"""What every weight transport can do, and what an engine receives."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor, uint8


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """One version of the weights, as safetensors parts (one a pipeline stage) with Hugging Face names."""

    version: int
    parts: tuple[Path, ...]
    checksums: dict[str, int]
    """Of every tensor as it was sent; empty where not asked for."""
    bytes: int

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor at a time, mapped rather than read."""
        for part in self.parts:
            with safe_open(part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    yield name, file.get_tensor(name)

    def checksum(self, tensor: Tensor) -> int:
        """The tensor's checksum, or 0 where the sender took none."""
        return tensor_checksum(tensor) if self.checksums else 0

    def verify(self, received: dict[str, int]) -> None:
        """Raise unless the receiver took exactly what was sent; says nothing where the sender took no checksums."""
        wrong = [name for name, value in self.checksums.items() if received.get(name) != value]
        if wrong:
            raise RuntimeError(
                f"weights of version {self.version} arrived damaged: {len(wrong)} of "
                f"{len(self.checksums)} tensors differ, the first is {wrong[0]}"
            )

    @staticmethod
    def merge(updates: Iterable[WeightUpdate]) -> WeightUpdate:
        """The parts of all pipeline stages as one update."""
        updates = list(updates)
        versions = {update.version for update in updates}
        if len(versions) != 1:
            raise RuntimeError(f"pipeline stages published different weight versions: {sorted(versions)}")
        return WeightUpdate(
            version=versions.pop(),
            parts=tuple(part for update in updates for part in update.parts),
            checksums={name: value for update in updates for name, value in update.checksums.items()},
            bytes=sum(update.bytes for update in updates),
        )


class WeightTransport(Protocol):
    """The sending side, one on each publishing rank. What arrived is checked by `WeightUpdate.verify`."""

    def connect(self) -> None: ...

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool) -> WeightUpdate: ...

    def close(self) -> None: ...


def tensor_checksum(tensor: Tensor) -> int:
    """CRC-32 of the tensor's bytes, whatever its dtype."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
