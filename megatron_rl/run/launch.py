"""The settings that the engines of a run are started with."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.models.hf_format import read_config
from megatron_rl.rollout.servers.server import ServerLaunch


def launch_of(config: Config, model_folder: Path) -> ServerLaunch:
    """Returns the launch settings of every engine, whichever kind it is."""
    actor, server = config.actor, config.rollout.server
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return ServerLaunch(
        model_folder=model_folder.resolve(),
        device="cpu" if actor.device == "cpu" else "cuda",
        dtype=actor.dtype,
        tensor_parallel=server.tensor_parallel,
        max_tokens=min(longest, read_config(model_folder)["max_position_embeddings"]),
        colocated=config.cluster.colocate and actor.device != "cpu",
        arguments=tuple(server.arguments),
        environment=dict(server.environment),
        python=server.python,
    )
