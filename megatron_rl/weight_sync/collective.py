"""Weights broadcast to engines wherever they are: nccl between GPUs, gloo between CPUs."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_rl.utils.memory import Reused
from megatron_rl.weight_sync import process_group
from megatron_rl.weight_sync.buckets import flattened
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.transport import GroupMember, NamedTensors, Pushed, WeightsNotSent


class CollectiveTransport:
    """Implements `WeightTransport`: this stage is rank 0 of a group of its own with all engines.

    The engines are told the buckets beforehand (`CollectiveUpdate`), so nothing but the weights travels.
    """

    def __init__(self, member: GroupMember, stage: int, bucket_bytes: int) -> None:
        self.member, self.stage, self.bucket_bytes = member, stage, bucket_bytes
        self._group: dist.ProcessGroup | None = None
        self._memory = Reused()
        """Of buckets on a CPU. On a GPU torch keeps what was freed, and training has it meanwhile."""

    def connect(self) -> None:
        """Returns when all engines have joined. Raises WeightsNotSent when one does not."""
        try:
            self._group = process_group.join(self.member)
        except RuntimeError as error:
            raise WeightsNotSent(f"not all engines came to {self.member.name}: {error}") from error

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        assert self._group is not None, "no engine has been met"
        total, memory = 0, self._memory if self.member.backend == "gloo" else Reused()
        for flat in flattened(taker.watch(tensors) if taker else tensors, self.bucket_bytes, memory):
            if failure := self._broadcast(flat):
                self.close()  # engines that wait for the rest then see that it will not come
                raise WeightsNotSent(f"weights of version {version} broke off after {total} bytes: {failure}")
            total += flat.nbytes
        return Pushed(self.stage, total, checksums=taker.result() if taker else None)

    def _broadcast(self, flat: Tensor) -> str | None:
        """Returns what went wrong, if anything. The error itself would keep the group alive, and gloo's connections end
        with it alone."""
        try:
            dist.broadcast(flat, group=self._group, group_src=0)
        except RuntimeError as error:
            return str(error)
        return None

    def close(self) -> None:
        if self._group is not None:
            process_group.leave(self._group)
            self._group = None
