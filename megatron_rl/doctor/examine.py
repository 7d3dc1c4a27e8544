"""All checks, in the order of what they cost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.doctor.finding import Finding
from megatron_rl.doctor.machine import check_disk, check_gpus, check_limits, check_ports, check_shared_memory
from megatron_rl.doctor.versions import check_versions

LEAST_BYTES = 5 * 2**30
"""For a run whose size is not known."""


def examine(config: Config | None, *, quick: bool) -> Iterator[Finding]:
    """Of this machine; and without `quick`, of the cluster that the configuration asks for."""
    device = config.actor.device if config else "auto"
    if device == "auto":  # without torch: it would take seconds to ask
        device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    yield from check_versions(device)
    yield from check_gpus(device)
    yield from check_limits(device)
    yield check_shared_memory(device)
    folder = config.run.folder if config else Path("runs")
    yield check_disk(folder, LEAST_BYTES, "a run")
    if quick or config is None:
        return
    if not os.environ.get("RAY_ADDRESS"):
        first = config.cluster.slurm.port
        yield check_ports(range(first, first + 7))
    from megatron_rl.doctor.cluster import check_cluster

    yield from check_cluster(config)
