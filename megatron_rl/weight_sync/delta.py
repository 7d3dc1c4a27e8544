"""Transport by broadcast of those weights only that changed since the last update, bit for bit.

Both sides keep the tensors of the last update in host memory. For each bucket the sender broadcasts a header, with the
number of changed weights and a checksum for each tensor; then the places and the values of these weights. A tensor goes
whole if that is less, or if it was never sent in this group: a group that forms anew, as for an engine that is new or
has failed, begins with the whole weights. The engine puts the values into its copy, compares the checksum of the whole
tensor, and loads it as from any other transport.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.utils import heartbeat
from megatron_rl.weight_sync.broadcast import BroadcastTransport
from megatron_rl.weight_sync.buckets import TensorSpec, bucketed
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.process_group import BroadcastFailed, BroadcastGroup
from megatron_rl.weight_sync.transport import GroupMember, NamedTensors, Pushed, WeightsNotSent

WHOLE = -1
"""Stands in the header in place of the number of changed weights."""
INDEX = torch.int32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> the integers that have its bits, so that NaN equals itself and 0.0 differs from -0.0."""


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """The change of one tensor."""

    places: Tensor | None
    """Positions in the flattened tensor, int32 [n]; None if all weights are in `bits`."""
    bits: Tensor
    """New values as integers [n]."""
    checksum: int
    """Of the whole new tensor."""


def bits_of(tensor: Tensor) -> Tensor:
    """Returns the flattened values as integers; a view if the tensor is contiguous."""
    return tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])


def checksum(tensor: Tensor) -> int:
    """Returns the first 64 bits of the digest, which is taken where the tensor lies, as a signed integer."""
    value = int(digest(tensor).partition(":")[2][:16], 16)
    return value - 2**64 if value >= 2**63 else value


class Copies:
    """The tensors of the last update in host memory, as integers, by name."""

    def __init__(self) -> None:
        self._bits: dict[str, Tensor] = {}

    def patch(self, name: str, tensor: Tensor) -> Patch:
        """Returns what changed since the last call with this name, and keeps the new values."""
        new, old = bits_of(tensor), self._bits.get(name)
        places = None
        if old is not None and old.shape == new.shape and old.dtype == new.dtype and new.numel() <= 2**31:
            places = (new != old.to(new.device)).nonzero().view(-1)
            if places.numel() * (INDEX.itemsize + new.element_size()) >= new.nbytes:
                places = None
        patch = Patch(
            None if places is None else places.to(INDEX),
            new.clone() if places is None else new[places],  # the tensor's memory may be reused for the next one
            checksum(tensor),
        )
        self.apply(name, patch)
        return patch

    def apply(self, name: str, patch: Patch) -> Tensor:
        """Puts the new values in; returns all bits of the tensor. Raises RuntimeError without a copy to change."""
        bits = patch.bits.cpu()
        if patch.places is None:
            self._bits[name] = bits.clone()
        elif name not in self._bits:
            raise RuntimeError(f"there is no copy of {name} to which changes apply")
        else:
            self._bits[name][patch.places.cpu().long()] = bits
        return self._bits[name]


class DeltaTransport(BroadcastTransport):
    """Implements `WeightTransport`."""

    def __init__(self, member: GroupMember, stage: int, bucket_bytes: int) -> None:
        super().__init__(member, stage, bucket_bytes)
        self._sent = Copies()

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        """See `WeightTransport`. `bytes` of the report are those that were sent."""
        total, patches = 0, list[Patch]()
        watched = taker.watch(tensors) if taker else tensors
        try:
            for opens, name, tensor in bucketed(watched, self.bucket_bytes):
                if opens and patches:
                    total += self._send(patches)
                    patches = []
                heartbeat.notify(f"sending changed weights, {total} bytes so far")
                patches.append(self._sent.patch(name, tensor))
            total += self._send(patches) if patches else 0
        except BroadcastFailed as error:
            raise WeightsNotSent(f"sending weights of version {version} failed after {total} bytes: {error}") from error
        return Pushed(self.stage, total, checksums=taker.result() if taker else None)

    def _send(self, patches: Sequence[Patch]) -> int:
        """Broadcasts the changes of a bucket; returns the bytes."""
        assert self._group is not None, "connect() was not called"
        counts = [WHOLE if patch.places is None else patch.places.numel() for patch in patches]
        header = torch.tensor([*zip(counts, (patch.checksum for patch in patches), strict=True)], dtype=torch.int64)
        places = [patch.places for patch in patches if patch.places is not None]
        bits = torch.cat([patch.bits for patch in patches])
        parts = [header.to(bits.device), *([torch.cat(places)] if places else []), bits]
        for part in (part for part in parts if part.numel()):
            self._group.broadcast(part.view(-1).view(torch.uint8))  # gloo knows no int16
        return sum(part.nbytes for part in parts)


class DeltaReceiver:
    """Receives the weights in a process of an engine. Methods raise RuntimeError if that fails."""

    def __init__(self, member: GroupMember, index: int, device: torch.device) -> None:
        """Blocks until all processes have joined."""
        self.device = device
        self._group = BroadcastGroup(member, index)
        self._held = Copies()

    @contextmanager
    def bucket(self, specs: Sequence[TensorSpec]) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Yields the next bucket's whole tensors, in memory of their own. An error makes the sender fail too."""
        try:
            yield self._tensors(specs)
        except BaseException:
            self._group.abort()
            raise

    def _tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        header = self._receive(2 * len(specs), torch.int64).view(-1, 2).tolist()
        dtype = getattr(torch, specs[0].dtype)
        counts = [count for count, _ in header]
        changed = [max(0, count) for count in counts]
        sizes = [
            spec.nbytes // dtype.itemsize if count == WHOLE else count
            for spec, count in zip(specs, counts, strict=True)
        ]
        places = self._receive(sum(changed), INDEX).split(changed)
        bits = self._receive(sum(sizes), _BITS[dtype.itemsize]).split(sizes)
        for spec, (count, expected), at, new in zip(specs, header, places, bits, strict=True):
            whole = self._held.apply(spec.name, Patch(None if count == WHOLE else at, new, expected))
            tensor = whole.to(self.device, copy=True).view(dtype).view(spec.shape)
            if checksum(tensor) != expected:
                raise RuntimeError(f"{spec.name} differs from what was sent after its changed weights were put in")
            yield spec.name, tensor

    def _receive(self, count: int, dtype: torch.dtype) -> Tensor:
        received = torch.empty(count, dtype=dtype, device=self.device)
        if count:
            self._group.broadcast(received.view(torch.uint8))
        return received

    def close(self) -> None:
        self._group.leave()
