"""Whether the configured layout suits the configured model. Needs the model's config.json alone."""

from __future__ import annotations

from megatron_rl.config import Config
from megatron_rl.config.actor import ActorSettings
from megatron_rl.models.hf_format import read_config
from megatron_rl.parallel.layout import Layout, validate_layout
from megatron_rl.parallel.placement import Placement, place


def layout_of(actor: ActorSettings) -> Layout:
    return Layout(
        tensor=actor.tensor_parallel,
        pipeline=actor.pipeline_parallel,
        data=actor.data_parallel,
        context=actor.context_parallel,
        expert=actor.expert_parallel,
        virtual_pipeline=actor.virtual_pipeline,
        sequence_parallel=actor.sequence_parallel,
    )


def placement_of(config: Config) -> Placement:
    """Raises UserError where the cluster is too small."""
    on_gpu, server = config.actor.device != "cpu", config.rollout.server
    engine_gpus = server.tensor_parallel if on_gpu and not server.urls else 0
    engines = 0 if config.rollout.replay else config.rollout.engines
    return place(layout_of(config.actor), engines, config.cluster, engine_gpus=engine_gpus, on_gpu=on_gpu)


def check_layout(config: Config) -> None:
    """Raises UserError where the model cannot be spread as asked. One that `prepare` has yet to write passes."""
    if config.model.path.exists():
        validate_layout(read_config(config.model.path), layout_of(config.actor), config.actor.pad_vocabulary)
