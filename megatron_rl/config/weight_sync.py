"""The `weight_sync` section: the transport of new weights to the engines."""

from __future__ import annotations

from typing import Literal

from .fields import Count, FilePath, PositiveInt, Section

BROADCASTS = ("collective", "delta")
"""Values of `transport` with which weights go over a network to servers that may be on any node."""


class WeightSyncSettings(Section):
    """Transport of weights after every step. Engines answer no request while an update is incomplete."""

    transport: Literal["auto", "shared_memory", "disk", "collective", "delta", "cuda_ipc"] = "auto"
    """shared_memory: a folder in memory, for engines on the actor's node, or with `cluster.colocate` on its nodes, each
    of which gets a copy over the actor's network. disk: a folder that all nodes share.
    collective: a broadcast to servers, by nccl between GPUs and gloo between CPUs. delta: a broadcast of those weights
    only that changed, for slow networks; the first rank of each stage holds a copy of the stage in host memory, and
    each process of a server a copy of the model; it has not been run on a GPU yet. cuda_ipc: memory of the actor's
    GPUs, for servers on the same GPUs (`cluster.colocate`) of one node; it has not been run on a GPU yet. auto:
    collective for servers with GPUs of their own, shared_memory for servers on the actor's GPUs and on one node,
    otherwise disk."""
    folder: FilePath | None = None
    """Folder of the disk transport, as large as the model. Default: `weights` in the run's folder."""
    bucket_megabytes: PositiveInt = 512
    """Size of a transfer bucket, which both sides hold in addition to the model. A larger tensor is sent alone. With
    cuda_ipc, the actor holds two buckets permanently."""
    verify_every: Count = 0
    """Number of updates between comparisons of the checksums of all weights on both sides. 0 compares after the first
    update only."""
