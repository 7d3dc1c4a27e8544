"""The settings that the engines of a run are started with."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import engine_kind
from megatron_rl.run.prompts import longest_response, positions_of


def launch_of(config: Config, model_folder: Path) -> EngineLaunch:
    """Returns what each engine of the run is started with. Raises UserError if `rollout.engine` cannot be imported."""
    longest = config.data.max_prompt_tokens + longest_response(config)
    return EngineLaunch(
        kind=engine_kind(config.rollout.engine),
        model_folder=model_folder.resolve(),
        device="cpu" if config.actor.device == "cpu" else "cuda",
        dtype=config.actor.dtype,
        max_tokens=min(longest, positions_of(config)),
        server=config.rollout.server,
        colocated=config.cluster.colocate and config.actor.device != "cpu",
        keeps_requests=config.keeps_requests,
    )
