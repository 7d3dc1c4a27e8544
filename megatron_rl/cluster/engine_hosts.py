"""Where engines and the router live: a process of Ray each, with a log of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.cluster.runtime import Hosted, HostedAsync, Nodes, host_process
from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.rollout.servers.server import ServerLaunch


def host_engine(rollout: RolloutSettings, launch: ServerLaunch, logs: Path, nodes: Nodes, number: int) -> Any:
    placement = nodes.placement
    if rollout.engine == "transformers":
        target = "megatron_rl.rollout.engines.transformers.engine:TransformersEngine"
        arguments: tuple[Any, ...] = (launch.model_folder, launch.device, launch.dtype)
    else:
        target = "megatron_rl.rollout.servers.http_engine:HttpEngine"
        url = rollout.server.urls[number] if rollout.server.urls else None
        if rollout.server.router:  # which is on one node, and reaches it from there
            launch = replace(launch, host=nodes.address(placement.engines[number]))
        arguments = (rollout.engine, rollout.server, launch, url)
    return host_process(
        target,
        arguments,
        log_file=log_file(logs, f"engine {number}"),
        nodes=nodes,
        node=placement.engines[number],
        gpus=placement.engine_gpus,
        devices=nodes.engine_devices(number),
        hosted=Hosted if rollout.engine == "transformers" else HostedAsync,
    )


def host_router(rollout: RolloutSettings, logs: Path, nodes: Nodes) -> Any:
    return host_process(
        "megatron_rl.rollout.servers.router:Router",
        (rollout.server,),
        log_file=log_file(logs, "the router"),
        nodes=nodes,
        node=nodes.placement.engines[0],
        gpus=0,
        cpus=0,
        hosted=HostedAsync,
    )


def log_file(logs: Path, name: str) -> Path:
    return logs / f"{name.removeprefix('the ').replace(' ', '-')}.log"
