"""Weights through memory of the sender that engines have mapped: one copy into it and one out of it, all on the GPU.

It has two halves. While engines read a bucket in one, the next is written into the other. They agree on it over a gloo
group: all meet when a bucket is there, and again when it was read. Whoever failed says so there, and then all stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weight_sync import process_group
from megatron_rl.weight_sync.buckets import TensorSpec, bucketed, unflatten
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.device_memory import DeviceMemory, allocate, attach
from megatron_rl.weight_sync.transport import GroupMember, NamedTensors, Pushed, WeightsNotSent

HALVES = 2
_MESSAGE_BYTES = 512


class Meeting:
    """A group in which nobody goes on alone. RuntimeError says that a member failed, or is not there any more."""

    def __init__(self, member: GroupMember, index: int = 0) -> None:
        """index: a process's place within its engine."""
        self.rank, self.size = member.rank + index, member.size
        self._group: dist.ProcessGroup | None = process_group.join(member, index)

    def meet(self, *, failed: bool = False) -> None:
        """Return when all are here."""
        failures = torch.zeros(self.size, dtype=torch.int32)
        failures[self.rank] = int(failed)
        self._do(lambda group: dist.all_reduce(failures, group=group))
        if others := [rank for rank in failures.nonzero().flatten().tolist() if rank != self.rank]:
            raise RuntimeError(f"it failed in {', '.join(map(_who, others))}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """All meet at the end of the block, also when it raises here."""
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                self.meet(failed=True)
            raise
        self.meet()

    def tell(self, text: str = "") -> str:
        """The sender's words, to all."""
        message = torch.tensor(list(text.ljust(_MESSAGE_BYTES).encode()), dtype=torch.uint8)
        self._do(lambda group: dist.broadcast(message, group=group, group_src=0))
        return bytes(message.tolist()).decode().rstrip()

    def _do(self, work: Callable[[dist.ProcessGroup], object]) -> None:
        """Whoever sees it break leaves, so that those see it too who wait for this one."""
        if trouble := self._trouble(work):
            self.leave()
            raise RuntimeError(trouble)

    def _trouble(self, work: Callable[[dist.ProcessGroup], object]) -> str:
        """What went wrong, if anything. The error itself would keep the group, and with it its connections."""
        if self._group is None:
            return "the group has broken up"
        try:
            work(self._group)
        except RuntimeError as error:
            return str(error) or type(error).__name__
        return ""

    def leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            process_group.leave(group)


class MappedTransport:
    """Implements `WeightTransport`: this stage is rank 0 of a group of its own with all engines."""

    def __init__(self, member: GroupMember, stage: int, bucket_bytes: int, device: torch.device) -> None:
        self.member, self.stage, self.bucket_bytes, self.device = member, stage, bucket_bytes, device
        self._meeting: Meeting | None = None
        self._halves: list[DeviceMemory] = []
        self._portions = 0
        """Written since all have met."""

    def connect(self) -> None:
        """Returns when all engines have mapped the memory. Raises WeightsNotSent when one does not."""
        try:
            self._meeting = Meeting(self.member)
            for _ in range(HALVES):
                self._halves.append(allocate(self.bucket_bytes, self.device))
                self._meeting.tell(self._halves[-1].address())
            self._meeting.meet()
        except (RuntimeError, OSError) as error:
            self.close()
            raise WeightsNotSent(f"not all engines came to {self.member.name}: {error}") from error
        for half in self._halves:
            half.all_attached()

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        total, first = 0, self._portions
        for written in self._written(taker.watch(tensors) if taker else tensors):
            if self._portions > first:
                self._meet(version, total)  # the last one was read
            self._meet(version, total)  # this one is there
            self._portions, total = self._portions + 1, total + written
        if self._portions > first:
            self._meet(version, total)
        return Pushed(self.stage, total, checksums=taker.result() if taker else None)

    def _written(self, tensors: NamedTensors) -> Iterator[int]:
        """Bytes of each portion that is there: a bucket, or, of one that is a single larger tensor, as many as fit."""
        filled: int | None = None
        for opens, tensor in bucketed(tensors, self.bucket_bytes):
            pieces = tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(self.bucket_bytes)
            for number, piece in enumerate(pieces):
                if filled is not None and (opens or number):
                    self._half.wait()
                    yield filled
                    filled = None
                start = filled or 0
                self._half.write(start, piece)
                filled = start + piece.nbytes
        if filled is not None:
            self._half.wait()
            yield filled

    @property
    def _half(self) -> DeviceMemory:
        return self._halves[self._portions % HALVES]

    def _meet(self, version: int, total: int) -> None:
        assert self._meeting is not None
        try:
            self._meeting.meet()
        except RuntimeError as error:
            raise WeightsNotSent(f"weights of version {version} broke off after {total} bytes: {error}") from error

    def close(self) -> None:
        if self._meeting is not None:
            self._meeting.leave()
        for half in self._halves:
            half.close()
        self._meeting, self._halves = None, []


class MappedReceiver:
    """An engine's process. Every method raises RuntimeError where its own part, or another's, failed."""

    def __init__(self, member: GroupMember, index: int, device: torch.device) -> None:
        """Returns when all have come."""
        self.device = device
        self._meeting = Meeting(member, index)
        self._halves: list[DeviceMemory] = []
        self._portions = 0
        try:
            addresses = [self._meeting.tell() for _ in range(HALVES)]
            with self._meeting.together():
                self._halves = [attach(address, device) for address in addresses]
        except BaseException:
            self.close()
            raise

    @contextmanager
    def bucket(self, specs: Sequence[TensorSpec]) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """The next bucket's tensors, in memory of their own. The sender learns of an error in the block."""
        with self._meeting.together():
            flat = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8, device=self.device)
        *first, last = flat.split(self._halves[0].nbytes)
        for piece in first:
            with self._meeting.together():
                self._read(piece)
            self._meeting.meet()
        with self._meeting.together():
            self._read(last)
            yield unflatten(flat, specs)

    def _read(self, piece: Tensor) -> None:
        half = self._halves[self._portions % HALVES]
        self._portions += 1
        half.read(0, piece)
        half.wait()

    def close(self) -> None:
        self._meeting.leave()
        for half in self._halves:
            half.close()
        self._halves = []


def _who(rank: int) -> str:
    return f"process {rank} of the engines" if rank else "the actor"
