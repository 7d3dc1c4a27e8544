"""The `weight_sync` section: how new weights reach the engines."""

from __future__ import annotations

from typing import Literal

from .fields import Count, FilePath, PositiveInt, Section


class WeightSyncSettings(Section):
    """After every step. Engines answer nothing while they have half of an update."""

    transport: Literal["auto", "shared_memory", "disk", "collective", "cuda_ipc"] = "auto"
    """shared_memory: a folder in memory, for engines on the actor's node. disk: a folder that all nodes see.
    collective: a broadcast, nccl between GPUs and gloo between CPUs, to servers only. cuda_ipc: through memory of the
    actor's GPUs, to servers on the same GPUs (`cluster.colocate`) of one node; never run on a GPU yet. auto: collective
    for servers on GPUs of their own, else shared_memory, or disk where there are several nodes."""
    folder: FilePath | None = None
    """Of disk; unset: `weights` in the run's folder. As large as the model."""
    bucket_megabytes: PositiveInt = 512
    """Most that is sent in one go, a single larger tensor aside: what each side holds beside the model. Of cuda_ipc,
    the actor holds twice as much all the time."""
    verify_every: Count = 0
    """Updates after which the checksums of all weights are compared on both sides; 0: after the first only."""
