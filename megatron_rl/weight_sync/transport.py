"""The interface of a weight transport, and the description of an update that an engine receives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Protocol

from safetensors import safe_open
from torch import Tensor

from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.checksums import Checksums, ChecksumTaker

NamedTensors = Iterable[tuple[str, Tensor]]
"""Pairs of Hugging Face name and complete tensor. A tensor's memory may be reused once the next one is drawn."""


NodeFolders = Mapping[int, Path]
"""Rank of the actor -> the folder of its node into which the rank writes a stage's weights."""


GroupTransport = Literal["collective", "delta", "cuda_ipc"]
"""The values of `weight_sync.transport` for which the actor and the engines form groups: a broadcast of all weights, a
broadcast of those that changed (`delta.py`), or memory of the sender that the engines map (`mapped.py`), in which case
the group only synchronises."""


class WeightsNotSent(RuntimeError):
    """Sending an update failed: engines may hold a part of it."""


@dataclass(frozen=True, slots=True)
class FolderUpdate:
    """One version of the weights, as safetensors files with Hugging Face names."""

    version: int
    parts: tuple[Path, ...]
    """Paths of the files, all in one folder."""
    take_checksums: bool = False
    """Take checksums while reading, for an engine that cannot read back all of its weights."""
    nbytes: int = 0
    """Bytes of all parts together; 0 if unknown."""

    @property
    def folder(self) -> Path:
        return self.parts[0].parent

    def at(self, folder: Path) -> FolderUpdate:
        """Returns the same update, as another folder has it."""
        return replace(self, parts=tuple(folder / part.name for part in self.parts))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields one tensor at a time, mapped from the file."""
        for part in self.parts:
            with safe_open(part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                    yield name, file.get_tensor(name)


@dataclass(frozen=True, slots=True)
class GroupMember:
    """How a process joins the group over which one pipeline stage sends its weights."""

    name: str
    host: str
    port: int
    backend: str
    """gloo or nccl."""
    size: int
    rank: int
    """Rank in the group: 0 for the stage, and for an engine that of its first process."""
    timeout_seconds: float
    transport: GroupTransport = "collective"


@dataclass(frozen=True, slots=True)
class StageBuckets:
    """The buckets that one group receives, in order."""

    group: str
    buckets: tuple[tuple[TensorSpec, ...], ...]


@dataclass(frozen=True, slots=True)
class CollectiveUpdate:
    """One version of the weights, broadcast bucket by bucket while the engine receives it."""

    version: int
    stages: tuple[StageBuckets, ...]
    take_checksums: bool = False

    def portions(self) -> list[tuple[str, tuple[TensorSpec, ...]]]:
        """Returns (group, bucket) in the order in which every engine receives them.

        The stages take turns, so that each prepares and sends a bucket while the engines load those of the others.
        """
        of_stages = [[(stage.group, bucket) for bucket in stage.buckets] for stage in self.stages]
        return [portion for turn in zip_longest(*of_stages) for portion in turn if portion is not None]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for stage in self.stages for bucket in stage.buckets for spec in bucket)


WeightUpdate = FolderUpdate | CollectiveUpdate


@dataclass(frozen=True, slots=True)
class Pushed:
    """Report of what one pipeline stage has sent."""

    stage: int
    bytes: int
    parts: tuple[Path, ...] = ()
    checksums: Checksums | None = None


class WeightTransport(Protocol):
    """The sending side of a transport; each publishing rank has one."""

    def connect(self) -> None:
        """Prepare for pushing, and meet the engines if the transport needs them. Raises WeightsNotSent."""
        ...

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        """Send this stage's tensors and let `taker` take their checksums. Raises WeightsNotSent."""
        ...

    def stop(self) -> None:
        """Makes a `push` that waits for a failed engine in another thread fail, unless it fails by itself."""
        return None

    def close(self) -> None: ...
