"""The settings that the engines of a run are started with."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.models.hf_format import read_config
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import engine_kind


def launch_of(config: Config, model_folder: Path) -> EngineLaunch:
    """Returns what each engine of the run is started with. Raises UserError if `rollout.engine` cannot be imported."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return EngineLaunch(
        kind=engine_kind(config.rollout.engine),
        model_folder=model_folder.resolve(),
        device="cpu" if config.actor.device == "cpu" else "cuda",
        dtype=config.actor.dtype,
        max_tokens=min(longest, read_config(model_folder)["max_position_embeddings"]),
        server=config.rollout.server,
        colocated=config.cluster.colocate and config.actor.device != "cpu",
    )
