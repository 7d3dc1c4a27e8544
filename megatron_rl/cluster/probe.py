"""Checks of a cluster before a run: of every node, and of every process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray
from ray import ObjectRef

from megatron_rl.cluster.runtime import Nodes, host_process
from megatron_rl.errors import UserError
from megatron_rl.parallel.layout import Layout

R = TypeVar("R")
Sums = dict[str, tuple[tuple[int, ...], float]]
"""Name of a process group -> its ranks, and the seconds of a sum over them."""

SILENCE_SECONDS = 180.0
"""A check fails if none of the processes that it waits for answers for this long."""
START_SECONDS = 900.0
"""The same while processes start, which import torch and Megatron: a busy node takes its time over that."""
ROUND_TRIPS = 3


def on_every_node(nodes: Nodes, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a function on each node of a run; returns its results in the nodes' order."""
    return _answers([_on(nodes, node, function, *arguments) for node in nodes.bundles])


def clock_skews(nodes: Nodes) -> list[tuple[float, float]]:
    """Seconds by which each node's clock is ahead of this node's, and the error bound of that."""
    return [min((_skew(nodes, node) for _ in range(ROUND_TRIPS)), key=lambda skew: skew[1]) for node in nodes.bundles]


@dataclass(frozen=True, slots=True)
class Collectives:
    """Answers of the ranks of a layout, in their order."""

    libraries: list[str]
    """gloo, or nccl with its version."""
    sums: list[Sums]
    """For each rank, the process groups that it is in."""


class RankCheck(Protocol):
    """One rank of a layout: `actor.collective_check.CollectiveCheck`, which loads Megatron."""

    def open_port(self, host: str) -> int: ...

    def run(self, host: str, port: int) -> Sums: ...

    def library(self) -> str: ...


def _check(device: str, layout: Layout, rank: int) -> RankCheck:
    from megatron_rl.actor.collective_check import CollectiveCheck

    return CollectiveCheck(device, layout, rank)


def collectives(nodes: Nodes, device: str, layout: Layout, logs: Path) -> Collectives:
    """Sums over every process group of the layout. Raises UserError on a time-out, and whatever the ranks raise."""
    ranks = [
        host_process(
            partial(_check, device, layout, rank),
            log_file=logs / f"rank-{rank}.log",
            nodes=nodes,
            node=node,
            gpus=int(nodes.placement.on_gpu),
        )
        for rank, node in enumerate(nodes.placement.actors)
    ]
    try:
        hosts = _answers([rank.node_address() for rank in ranks], START_SECONDS)
        libraries = _answers([rank.submit(RankCheck.library) for rank in ranks], START_SECONDS)
        if nodes.placement.shared:
            nodes.rank_devices = _answers([rank.devices() for rank in ranks])
        port = _answers([ranks[0].submit(RankCheck.open_port, hosts[0])])[0]
        return Collectives(libraries, _answers([rank.submit(RankCheck.run, hosts[0], port) for rank in ranks]))
    finally:
        for rank in ranks:
            rank.kill()


def _on(nodes: Nodes, node: int, function: Callable[..., Any], *arguments: Any) -> ObjectRef[Any]:
    remote = ray.remote(function).options(num_cpus=0, scheduling_strategy=nodes.strategy(node))
    return remote.remote(*arguments)


def _skew(nodes: Nodes, node: int) -> tuple[float, float]:
    start = time.time()
    there = _answers([_on(nodes, node, _now)])[0]
    end = time.time()
    return there - (start + end) / 2, (end - start) / 2


def _now() -> float:
    return time.time()


def _answers(refs: list[ObjectRef[R]], silence: float = SILENCE_SECONDS) -> list[R]:
    """Returns the answers. Raises UserError if no further answer comes for `silence` seconds."""
    waiting = refs
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=silence)
        if not done:
            numbers = [index for index, ref in enumerate(refs) if ref in waiting]
            raise UserError(f"no answer within {silence:.0f} s from {numbers} of {len(refs)}")
    answers: list[R] = ray.get(refs)
    return answers
