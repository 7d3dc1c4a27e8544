"""What every weight transport can do, and what an engine is told of an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from torch import Tensor

from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.checksums import Checksums, ChecksumTaker

NamedTensors = Iterable[tuple[str, Tensor]]
"""Hugging Face name, whole tensor; one at a time: the next may be in its memory."""


class WeightsNotSent(RuntimeError):
    """An update broke off on its way: engines may have half of it."""


@dataclass(frozen=True, slots=True)
class FolderUpdate:
    """One version of the weights, as safetensors files with Hugging Face names."""

    version: int
    parts: tuple[Path, ...]
    """All in one folder."""
    take_checksums: bool = False
    """Of what is read, for an engine that cannot read back all that it holds."""
    nbytes: int = 0
    """Of all parts together; 0: not known."""

    @property
    def folder(self) -> Path:
        return self.parts[0].parent

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One tensor at a time, mapped rather than read."""
        for part in self.parts:
            with safe_open(part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    yield name, file.get_tensor(name)


@dataclass(frozen=True, slots=True)
class GroupMember:
    """How a process joins the group over which one pipeline stage broadcasts."""

    name: str
    host: str
    port: int
    backend: str
    """gloo or nccl."""
    size: int
    rank: int
    """0 is the stage's; of an engine, that of its first process."""
    timeout_seconds: float
    mapped: bool = False
    """Weights go through the sender's memory, which the others map; the group is to agree on when."""


@dataclass(frozen=True, slots=True)
class StageBuckets:
    """What comes over one group, in this order."""

    group: str
    buckets: tuple[tuple[TensorSpec, ...], ...]


@dataclass(frozen=True, slots=True)
class CollectiveUpdate:
    """One version of the weights, broadcast while the engine takes it: a bucket at a time, stage after stage."""

    version: int
    stages: tuple[StageBuckets, ...]
    take_checksums: bool = False

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for stage in self.stages for bucket in stage.buckets for spec in bucket)


WeightUpdate = FolderUpdate | CollectiveUpdate


@dataclass(frozen=True, slots=True)
class Pushed:
    """What one pipeline stage has sent."""

    stage: int
    bytes: int
    parts: tuple[Path, ...] = ()
    checksums: Checksums | None = None


class WeightTransport(Protocol):
    """The sending side, one on each publishing rank."""

    def connect(self) -> None: ...

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        """Send this stage's tensors; `taker` sees each of them. Raises WeightsNotSent."""
        ...

    def close(self) -> None: ...
