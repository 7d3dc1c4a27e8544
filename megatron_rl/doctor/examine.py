"""Runs all checks, the cheapest first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.data.hub import with_local_copies
from megatron_rl.doctor.findings import Finding
from megatron_rl.doctor.machine import (
    check_disk,
    check_gpus,
    check_limits,
    check_ports,
    check_shared_memory,
    shared_weights,
)
from megatron_rl.doctor.versions import check_server, check_versions
from megatron_rl.errors import UserError

SPARE_BYTES = 5 * 2**30
"""Free disk space that logs, dumps and Ray's files may take besides checkpoints. Small runs take much less."""


def examine(config: Config | None, *, quick: bool) -> Iterator[Finding]:
    """Check this machine and, unless `quick`, the cluster that the configuration needs."""
    if config:
        try:
            config = with_local_copies(config, download=False)
        except UserError as error:
            for problem in str(error).splitlines():
                yield Finding("model and data", "failure", *_split(problem))
    device = config.actor.device if config else "auto"
    if device == "auto":  # asking torch would take seconds
        device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    decided = config and config.model_copy(update={"actor": config.actor.model_copy(update={"device": device})})
    yield from check_versions(device)
    yield from check_gpus(device)
    yield from check_limits(device)
    yield check_shared_memory(device, shared_weights(decided) if decided else 0.0)
    if config and (finding := check_server(config.rollout)):
        yield finding
    yield _check_disk(config)
    if quick or not (config and decided):
        return
    if not os.environ.get("RAY_ADDRESS"):
        first = config.cluster.slurm.port
        yield check_ports(range(first, first + 7))
    from megatron_rl.doctor.cluster import check_cluster
    from megatron_rl.doctor.environments import check_environments

    yield from check_environments(decided)
    yield from check_cluster(config)


def _split(problem: str) -> tuple[str, str]:
    """Separates what is missing from the command that fetches it."""
    found, fetch, remedy = problem.partition(". Fetch")
    return found, f"fetch{remedy}" if fetch else ""


def _check_disk(config: Config | None) -> Finding:
    """Check the disk space for the kept checkpoints and the one being written, if the model is known."""
    if config is None:
        return check_disk(Path("runs"), 0, SPARE_BYTES, "a run")
    from megatron_rl.plan.setup import setup_of
    from megatron_rl.plan.times import checkpoint_bytes

    try:
        one = checkpoint_bytes(setup_of(config))
    except UserError:  # the model is not there yet; problems of the layout are reported by another check
        return check_disk(config.run.folder, 0, SPARE_BYTES, "a run")
    count = (config.train.keep_checkpoints or 1) + 1
    what = f"{count} checkpoints of {one / 2**30:.1f} GiB and the rest of a run"
    return check_disk(config.run.folder, count * one, SPARE_BYTES, what)
