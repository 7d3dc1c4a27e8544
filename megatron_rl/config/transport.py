"""Which way weights take to the engines. No Ray, so that a plan can count with it."""

from __future__ import annotations

from megatron_rl.config import Config


def transport_of(config: Config) -> str:
    """`weight_sync.transport`, auto decided."""
    if config.weight_sync.transport != "auto":
        return config.weight_sync.transport
    servers_on_gpus = config.rollout.engine != "transformers" and config.actor.device != "cpu"
    if servers_on_gpus and not config.cluster.colocate:  # nccl takes one process a GPU
        return "collective"
    return "shared_memory" if config.cluster.nodes == 1 else "disk"
