"""The processes of engines and of the router: one Ray process each, with a log of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_rl.cluster.runtime import Hosted, HostedAsync, HostedProcess, Nodes, host_process
from megatron_rl.config.rollout import ServerSettings
from megatron_rl.rollout.engines.interface import EngineLaunch, RequestRouter, RolloutEngine, make_engine
from megatron_rl.utils.nccl import agreed_environment


def host_engine(launch: EngineLaunch, logs: Path, nodes: Nodes, number: int) -> HostedProcess[RolloutEngine]:
    placement, server = nodes.placement, launch.server
    if server.urls:
        launch = replace(launch, url=server.urls[number])
    if server.router:  # the router is on one node, and reaches the engines from there
        launch = replace(launch, host=nodes.address(placement.engines[number]))
    return host_process(
        partial(make_engine, launch),
        log_file=log_file(logs, f"engine {number}"),
        nodes=nodes,
        node=placement.engines[number],
        gpus=placement.engine_gpus,
        devices=nodes.engine_devices(number),
        hosted=Hosted if launch.kind.embedded else HostedAsync,
        # The driver's values, as the ranks get them: Ray's own environment on a node may have others.
        variables=agreed_environment() if placement.engine_gpus or placement.shared else None,
    )


def host_router(settings: ServerSettings, logs: Path, nodes: Nodes) -> HostedProcess[RequestRouter]:
    return host_process(
        partial(_router, settings),
        log_file=log_file(logs, "the router"),
        nodes=nodes,
        node=nodes.placement.engines[0],
        gpus=0,
        cpus=0,
        hosted=HostedAsync,
    )


def _router(settings: ServerSettings) -> RequestRouter:
    """The router, whose methods are coroutines."""
    from megatron_rl.rollout.servers.router import Router

    router: object = Router(settings)
    return router  # type: ignore[return-value]


def log_file(logs: Path, name: str) -> Path:
    return logs / f"{name.removeprefix('the ').replace(' ', '-')}.log"
