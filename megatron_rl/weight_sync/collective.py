"""Transport by broadcast to engines on any node: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

from megatron_rl.utils import heartbeat
from megatron_rl.utils.memory import Alternating
from megatron_rl.weight_sync.broadcast import BroadcastTransport
from megatron_rl.weight_sync.buckets import flattened
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.process_group import BroadcastFailed
from megatron_rl.weight_sync.transport import GroupMember, NamedTensors, Pushed, WeightsNotSent


class CollectiveTransport(BroadcastTransport):
    """Implements `WeightTransport`.

    The engines learn the buckets beforehand (`CollectiveUpdate`), so only weights are sent. While a bucket is on its
    way, the next one is collected from the stage's ranks into a second buffer.
    """

    def __init__(self, member: GroupMember, stage: int, bucket_bytes: int) -> None:
        super().__init__(member, stage, bucket_bytes)
        self._memory = Alternating()
        """Memory of the buckets on a CPU. On a GPU torch's allocator caches freed memory and lends it to training."""

    def push(self, tensors: NamedTensors, version: int, taker: ChecksumTaker | None = None) -> Pushed:
        assert self._group is not None, "connect() was not called"
        total, memory = 0, self._memory if self.member.backend == "gloo" else Alternating()
        try:
            for flat in flattened(taker.watch(tensors) if taker else tensors, self.bucket_bytes, memory):
                heartbeat.notify(f"sending weights, {total} bytes so far")
                self._group.finish()  # the bucket before this one
                self._group.start(flat)
                total += flat.nbytes
            self._group.finish()
        except BroadcastFailed as error:  # the group is closed: engines that wait for the rest see that it is over
            raise WeightsNotSent(f"sending weights of version {version} failed after {total} bytes: {error}") from error
        return Pushed(self.stage, total, checksums=taker.result() if taker else None)
