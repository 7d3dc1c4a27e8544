"""The choice of weight transport. The module imports no Ray, so that `megatron-rl plan` can use it."""

from __future__ import annotations

from megatron_rl.config import Config


def transport_of(config: Config) -> str:
    """Returns `weight_sync.transport`, with `auto` resolved."""
    if config.weight_sync.transport != "auto":
        return config.weight_sync.transport
    servers_on_gpus = config.rollout.engine != "transformers" and config.actor.device != "cpu"
    if servers_on_gpus and not config.cluster.colocate:  # nccl allows one process per GPU
        return "collective"
    return "shared_memory" if config.cluster.nodes == 1 else "disk"
