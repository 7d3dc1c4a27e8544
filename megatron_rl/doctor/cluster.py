"""Checks of a run's nodes through Ray: alike, with one file system and equal clocks, and able to communicate."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config import Config
from megatron_rl.doctor.engines import check_engines
from megatron_rl.doctor.environments import PREFIX, check_environments
from megatron_rl.doctor.findings import Finding, judged
from megatron_rl.doctor.machine import check_gpus, check_limits, check_shared_memory, shared_weights
from megatron_rl.doctor.versions import check_versions
from megatron_rl.errors import UserError
from megatron_rl.run.stack import ACTOR, ENGINE
from megatron_rl.utils.format import counted

if TYPE_CHECKING:
    from megatron_rl.cluster.runtime import Nodes

SKEW_SECONDS = 5.0
"""Largest difference of clocks. More makes logs hard to compare; a few minutes make Slurm's nodes reject each other."""
ALIKE = ("Python", "packages", "GPUs", f"{PREFIX}{ACTOR}", f"{PREFIX}{ENGINE}")
"""Checks whose findings must be equal on all nodes."""

Report = tuple[str, bool, list[Finding]]
"""Report of a node: its name, whether it sees files of other nodes, and the findings on it."""


def check_cluster(config: Config) -> Iterator[Finding]:
    """Reserve the nodes as the run will, and check them. After a failure, checks that depend on it are left out."""
    from megatron_rl.cluster.runtime import ray_runtime
    from megatron_rl.models.layout_check import check_layout
    from megatron_rl.parallel.placement import placement_of
    from megatron_rl.run.opening import with_device

    config = with_device(config)
    try:
        check_layout(config)
        placement = placement_of(config)
        parent = next(path for path in config.run.folder.resolve().parents if path.is_dir())
        folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=parent))
    except (UserError, OSError) as error:
        yield Finding("layout", "failure", str(error), "see `megatron-rl plan`")
        return
    try:
        with ray_runtime(placement) as nodes:
            where = os.environ.get("RAY_ADDRESS") or "started for this check"
            yield Finding(
                "Ray", "ok", f"{counted(len(nodes.bundles), 'node')} of cluster.nodes: {config.cluster.nodes}, {where}"
            )
            yield from _check_nodes(config, nodes, folder)
            yield from _check_groups(config, nodes, folder)
            yield check_engines(config, nodes, folder)
    except UserError as error:
        yield Finding("Ray", "failure", str(error).strip(), "see docs/cluster.md, Slurm and Without Slurm")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def look_around(config: Config, folder: Path) -> Report:
    """Check the node that this runs on. If the token is visible in `folder`, the node adds a file of its own."""
    host, device = socket.gethostname(), config.actor.device
    seen = (folder / TOKEN).is_file()
    if seen:
        (folder / host).touch()
    findings = [*check_versions(device), *check_limits(device), *check_gpus(device)]
    findings.append(check_shared_memory(device, shared_weights(config)))
    return host, seen, [*findings, *check_environments(config)]


TOKEN = "token"


def _check_nodes(config: Config, nodes: Nodes, folder: Path) -> Iterator[Finding]:
    from megatron_rl.cluster.probe import clock_skews, on_every_node

    (folder / TOKEN).touch()
    reports: list[Report] = on_every_node(nodes, look_around, config, folder)
    apart = [host for host, seen, _ in reports if not (seen and (folder / host).is_file())]
    yield judged(
        "file system",
        not apart,
        f"{folder.parent}: " + (f"not the same on {', '.join(apart)}" if apart else "the same on all nodes"),
        "put run.folder, the model and the data where every node sees the same files",
    )
    for host, _, findings in reports:
        wrong = (finding for finding in findings if finding.state in ("warning", "failure"))
        yield from (Finding(f"{host}: {f.check}", f.state, f.found, f.remedy) for f in wrong)
    kinds = {tuple(f.found for f in findings if f.check in ALIKE) for _, _, findings in reports}
    hosts = ", ".join(host for host, _, _ in reports)
    yield judged(
        "nodes alike",
        len(kinds) == 1,
        hosts if len(kinds) == 1 else "; ".join(" / ".join(kind) for kind in sorted(kinds)),
        "use the same environment or image on all nodes",
    )
    for (host, _, _), (ahead, error) in zip(reports, clock_skews(nodes), strict=True):
        found = f"{ahead:+.2f} s relative to this machine, within {error:.2f} s"
        right = abs(ahead) - error < SKEW_SECONDS
        yield judged(f"{host}: clock", right, found, "synchronise the clocks (chrony, ntpd)", otherwise="warning")


def _check_groups(config: Config, nodes: Nodes, folder: Path) -> Iterator[Finding]:
    from megatron_rl.cluster.probe import collectives
    from megatron_rl.parallel.layout import layout_of

    try:
        answers = collectives(nodes, config.actor.device, layout_of(config.actor), folder)
    except Exception as error:  # any error of torch, NCCL or Ray is the finding
        last = str(error).strip().splitlines()[-1]
        remedy = "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the right interface; NCCL_DEBUG=INFO shows more"
        yield Finding("collectives", "failure", last, remedy)
        return
    libraries = sorted(set(answers.libraries))
    remedy = "use the same environment or image on all nodes: all must have the same version of NCCL"
    yield judged("NCCL or gloo", len(libraries) == 1, ", ".join(libraries), remedy)
    per_rank = answers.sums
    if not any(per_rank):
        yield Finding("collectives", "skipped", "a single rank has no other rank to communicate with")
    for name in dict.fromkeys(name for groups in per_rank for name in groups):
        members = {groups[name][0] for groups in per_rank if name in groups}
        slowest = max(groups[name][1] for groups in per_rank if name in groups)
        size = f"{len(members)} x {len(min(members))} ranks"
        yield Finding(name, "ok", f"{size}: a sum of 4 MiB in {slowest * 1e3:.1f} ms")
