"""Questions to a cluster before a run: every node, every process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from megatron_rl.cluster.runtime import Nodes, host_process
from megatron_rl.errors import UserError
from megatron_rl.parallel.layout import Layout

Sums = dict[str, tuple[tuple[int, ...], float]]
"""Name of a process group -> its ranks, and the seconds of a sum over them."""

TIMEOUT_SECONDS = 180.0
ROUND_TRIPS = 3


def on_every_node(nodes: Nodes, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function says on each node of a run."""
    return _answers([_on(nodes, node, function, *arguments) for node in nodes.bundles])


def clock_skews(nodes: Nodes) -> list[tuple[float, float]]:
    """Seconds by which each node's clock is ahead of this one's, and how far off that may be."""
    return [min((_skew(nodes, node) for _ in range(ROUND_TRIPS)), key=lambda skew: skew[1]) for node in nodes.bundles]


@dataclass(frozen=True, slots=True)
class Collectives:
    """What the ranks of a layout said, in their order."""

    libraries: list[str]
    """gloo, or nccl with its version."""
    sums: list[Sums]
    """Of the groups a rank is in."""


def collectives(nodes: Nodes, device: str, layout: Layout, logs: Path) -> Collectives:
    """A sum over every process group. Raises UserError on time-out, and what the ranks raise."""
    ranks = [
        host_process(
            "megatron_rl.actor.collective_check:CollectiveCheck",
            (device, layout, rank),
            log_file=logs / f"rank-{rank}.log",
            nodes=nodes,
            node=node,
            gpus=int(nodes.placement.on_gpu),
        )
        for rank, node in enumerate(nodes.placement.actors)
    ]
    try:
        if nodes.placement.shared:
            nodes.rank_devices = _answers([rank.devices.remote() for rank in ranks])
        host = _answers([ranks[0].node_address.remote()])[0]
        port = _answers([ranks[0].call.remote("open_port", host)])[0]
        libraries = _answers([rank.call.remote("library") for rank in ranks])
        return Collectives(libraries, _answers([rank.call.remote("run", host, port) for rank in ranks]))
    finally:
        for rank in ranks:
            ray.kill(rank)


def _on(nodes: Nodes, node: int, function: Callable[..., Any], *arguments: Any) -> ray.ObjectRef:
    remote = ray.remote(function).options(num_cpus=0, scheduling_strategy=nodes.strategy(node))
    return remote.remote(*arguments)


def _skew(nodes: Nodes, node: int) -> tuple[float, float]:
    start = time.time()
    there = _answers([_on(nodes, node, _now)])[0]
    end = time.time()
    return there - (start + end) / 2, (end - start) / 2


def _now() -> float:
    return time.time()


def _answers(refs: list[ray.ObjectRef]) -> list[Any]:
    _, late = ray.wait(refs, num_returns=len(refs), timeout=TIMEOUT_SECONDS)
    if late:
        numbers = [index for index, ref in enumerate(refs) if ref in late]
        raise UserError(f"no answer within {TIMEOUT_SECONDS:.0f} s from {numbers} of {len(refs)}")
    return ray.get(refs)
