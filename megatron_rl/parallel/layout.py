"""How a model is spread over ranks, and whether a model can be. Standard library only, so a dry run can ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism. Ranks are numbered tensor first, then data, then pipeline."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline rank; with more than one the schedule interleaves them."""
    sequence_parallel: bool = False
    """The tensor-parallel ranks share the sequence too, where they do not share the layer."""

    @property
    def world_size(self) -> int:
        """Expert parallelism lives inside the tensor- and data-parallel ranks and adds none."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def expert_tensor(self) -> int:
        """Ranks that share each expert: those that share other layers, or one where experts are shared out whole."""
        return self.tensor if self.expert == 1 else 1


def layout_of(actor: ActorSettings) -> Layout:
    """Returns the layout that the `actor` section of the configuration asks for."""
    return Layout(
        tensor=actor.tensor_parallel,
        pipeline=actor.pipeline_parallel,
        data=actor.data_parallel,
        context=actor.context_parallel,
        expert=actor.expert_parallel,
        virtual_pipeline=actor.virtual_pipeline,
        sequence_parallel=actor.sequence_parallel,
    )


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The smallest multiple of `tensor` that holds `vocabulary` tokens."""
    return -(-vocabulary // tensor) * tensor


def last_stage_layers(layers: int, pipeline: int) -> int:
    """Layers of the last pipeline stage when the others get equal shares: fewer than theirs where possible, since the
    last stage has the LM head as well."""
    share = -(-layers // pipeline)
    left = layers - share * (pipeline - 1)
    return left if left > 0 else layers - (layers // pipeline) * (pipeline - 1)
