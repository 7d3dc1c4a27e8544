"""What the transports that broadcast have in common: the sender's side of a process group."""

from __future__ import annotations

from megatron_rl.weight_sync.process_group import BroadcastGroup
from megatron_rl.weight_sync.transport import GroupMember, WeightsNotSent


class BroadcastTransport:
    """Part of a `WeightTransport`. Each stage is rank 0 of its own process group with all engines."""

    def __init__(self, member: GroupMember, stage: int, bucket_bytes: int) -> None:
        self.member, self.stage, self.bucket_bytes = member, stage, bucket_bytes
        self._group: BroadcastGroup | None = None

    def connect(self) -> None:
        """Blocks until all engines have joined. Raises WeightsNotSent if one does not join."""
        try:
            self._group = BroadcastGroup(self.member)
        except RuntimeError as error:
            raise WeightsNotSent(f"not all engines joined the group {self.member.name}: {error}") from error

    def stop(self) -> None:
        """See `WeightTransport`."""
        if self._group is not None:
            self._group.stop()

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None
