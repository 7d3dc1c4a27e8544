"""The weight transport of a run. This file does not import Ray, so that a plan can use it."""

from __future__ import annotations

from megatron_rl.config import Config
from megatron_rl.rollout.engines.kind import engine_kind


def transport_of(config: Config) -> str:
    """`weight_sync.transport`, with `auto` resolved. Raises UserError if `rollout.engine` cannot be imported."""
    if config.weight_sync.transport != "auto":
        return config.weight_sync.transport
    if config.actor.device != "cpu":
        if config.cluster.colocate:  # nccl takes one process per GPU; every engine is on a node of the actor
            return "shared_memory"
        if "collective" in engine_kind(config.rollout.engine).transports:
            return "collective"
    return "shared_memory" if config.cluster.nodes == 1 else "disk"
