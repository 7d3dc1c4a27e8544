"""The receivers of our own that run in the processes of an engine, for groups that are no plain broadcast."""

from __future__ import annotations

from megatron_rl.weight_sync.delta import DeltaReceiver
from megatron_rl.weight_sync.mapped import MappedReceiver
from megatron_rl.weight_sync.transport import GroupTransport

TensorReceiver = MappedReceiver | DeltaReceiver
RECEIVERS: dict[GroupTransport, type[MappedReceiver] | type[DeltaReceiver]] = {
    "cuda_ipc": MappedReceiver,
    "delta": DeltaReceiver,
}
"""Made with a `GroupMember`, the process's index within its engine, and its device."""
