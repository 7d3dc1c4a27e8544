"""Transport through memory of the sender that the engines have mapped: one copy in and one copy out, all on the GPU.

The memory has two halves: while the engines read a bucket from one half, the sender writes the next bucket into the
other. They synchronise over a gloo group, with one barrier when a bucket is written and one when it has been read. A
process that fails reports it at the barrier, and all processes stop.
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


class Barrier:
    """A barrier over a process group. Raises RuntimeError if a member failed or has gone away."""

    def __init__(self, member: GroupMember, index: int = 0) -> None:
        """Blocks until all members have joined. index: the process's index within its engine."""
        self.rank, self.size = member.rank + index, member.size
        self._group: dist.ProcessGroup | None = process_group.join(member, index)

    def wait(self, *, failed: bool = False) -> None:
        """Block until all members are here. failed: report a failure of this member to the others."""
        failures = torch.zeros(self.size, dtype=torch.int32)
        failures[self.rank] = int(failed)
        self._do(lambda group: dist.all_reduce(failures, group=group))
        if others := [rank for rank in failures.nonzero().flatten().tolist() if rank != self.rank]:
            raise RuntimeError(f"failure in {', '.join(map(_member_name, others))}")

    @contextmanager
    def then_wait(self) -> Iterator[None]:
        """Wait at the end of the block; if the block raises, report the failure to the other members."""
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                self.wait(failed=True)
            raise
        self.wait()

    def broadcast(self, text: str = "") -> str:
        """Send a text from rank 0 to all members, and return it."""
        message = torch.tensor(list(text.ljust(_MESSAGE_BYTES).encode()), dtype=torch.uint8)
        self._do(lambda group: dist.broadcast(message, group=group, group_src=0))
        return bytes(message.tolist()).decode().rstrip()

    def _do(self, work: Callable[[dist.ProcessGroup], object]) -> None:
        """Run a collective. A member that sees it fail leaves, so that the members that wait for it fail too."""
        if failure := self._failure(work):
            self.leave()
            raise RuntimeError(failure)

    def _failure(self, work: Callable[[dist.ProcessGroup], object]) -> str:
        """Returns the failure's message, or "". The exception itself would keep the group and its connections alive."""
        if self._group is None:
            return "the process group is closed after an earlier failure"
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
    """Implements `WeightTransport`. Each stage is rank 0 of its own process group with all engines."""

    def __init__(self, member: GroupMember, stage: int, bucket_bytes: int, device: torch.device) -> None:
        self.member, self.stage, self.bucket_bytes, self.device = member, stage, bucket_bytes, device
        self._barrier: Barrier | None = None
        self._halves: list[DeviceMemory] = []
        self._portions = 0
        """Number of portions written since `connect`; it decides which half is next."""

    def connect(self) -> None:
        """Blocks until all engines have mapped the memory. Raises WeightsNotSent if one does not."""
        try:
            self._barrier = Barrier(self.member)
            for _ in range(HALVES):
                self._halves.append(allocate(self.bucket_bytes, self.device))
                self._barrier.broadcast(self._halves[-1].address())
            self._barrier.wait()
        except (RuntimeError, OSError) as error:
            self.close()
            raise WeightsNotSent(f"not all engines joined the group {self.member.name}: {error}") from error
        for half in self._halves:
            half.all_attached()

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        total, first = 0, self._portions
        for written in self._written(taker.watch(tensors) if taker else tensors):
            if self._portions > first:
                self._wait(version, total)  # the previous portion has been read
            self._wait(version, total)  # this portion is written
            self._portions, total = self._portions + 1, total + written
        if self._portions > first:
            self._wait(version, total)
        return Pushed(self.stage, total, checksums=taker.result() if taker else None)

    def _written(self, tensors: NamedTensors) -> Iterator[int]:
        """Yields the bytes of each portion once written: a bucket, or a piece of a tensor larger than a bucket."""
        filled: int | None = None
        for opens, _, tensor in bucketed(tensors, self.bucket_bytes):
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

    def _wait(self, version: int, total: int) -> None:
        assert self._barrier is not None
        try:
            self._barrier.wait()
        except RuntimeError as error:
            raise WeightsNotSent(f"sending weights of version {version} failed after {total} bytes: {error}") from error

    def stop(self) -> None:
        """Does nothing: gloo, which all barriers use, notices a failed engine."""

    def close(self) -> None:
        if self._barrier is not None:
            self._barrier.leave()
        for half in self._halves:
            half.close()
        self._barrier, self._halves = None, []


class MappedReceiver:
    """Receives the weights in a process of an engine. Every method raises RuntimeError if any process failed."""

    def __init__(self, member: GroupMember, index: int, device: torch.device) -> None:
        """Blocks until all processes have joined and mapped the memory."""
        self.device = device
        self._barrier = Barrier(member, index)
        self._halves: list[DeviceMemory] = []
        self._portions = 0
        try:
            addresses = [self._barrier.broadcast() for _ in range(HALVES)]
            with self._barrier.then_wait():
                self._halves = [attach(address, device) for address in addresses]
        except BaseException:
            self.close()
            raise

    @contextmanager
    def bucket(self, specs: Sequence[TensorSpec]) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Yields copies of the next bucket's tensors. An error in the block is reported to the sender."""
        with self._barrier.then_wait():
            flat = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8, device=self.device)
        *first, last = flat.split(self._halves[0].nbytes)
        for piece in first:
            with self._barrier.then_wait():
                self._read(piece)
            self._barrier.wait()
        with self._barrier.then_wait():
            self._read(last)
            yield unflatten(flat, specs)

    def _read(self, piece: Tensor) -> None:
        half = self._halves[self._portions % HALVES]
        self._portions += 1
        half.read(0, piece)
        half.wait()

    def close(self) -> None:
        self._barrier.leave()
        for half in self._halves:
            half.close()
        self._halves = []


def _member_name(rank: int) -> str:
    return f"process {rank} of the engines" if rank else "the actor"
