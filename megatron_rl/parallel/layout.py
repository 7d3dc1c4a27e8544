"""How a model is split over ranks, and the sizes that follow from that. Standard library only.

`models/layout_check.py` checks that a given model fits a layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism. Ranks are numbered tensor-parallel first, then data-parallel, then pipeline-parallel."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline rank. With more than one, the schedule interleaves the chunks."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also split the sequence in the parts of a layer whose weights they do not split."""

    @property
    def world_size(self) -> int:
        """Number of ranks. Expert parallelism reuses the tensor- and data-parallel ranks, so it adds none."""
        return self.tensor * self.pipeline * self.data * self.context

    def replica_of(self, rank: int) -> int:
        """Returns the data-parallel replica that a rank belongs to."""
        return rank // (self.tensor * self.context) % self.data

    def stage_of(self, rank: int) -> int:
        """Returns the pipeline stage that a rank belongs to."""
        return rank * self.pipeline // self.world_size

    @property
    def expert_tensor(self) -> int:
        """Ranks that split each expert: the tensor-parallel ranks, or 1 under expert parallelism."""
        return self.tensor if self.expert == 1 else 1


def layout_of(actor: ActorSettings) -> Layout:
    """Returns the layout that the `actor` section of the configuration specifies."""
    return Layout(
        tensor=actor.tensor_parallel,
        pipeline=actor.pipeline_parallel,
        data=actor.data_parallel,
        context=actor.context_parallel,
        expert=actor.expert_parallel,
        virtual_pipeline=actor.virtual_pipeline,
        sequence_parallel=actor.sequence_parallel,
    )


VOCABULARY_UNIT = 16
"""Each rank's part of the vocabulary is a multiple of this: GPUs read rows of other lengths in smaller pieces."""


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """Returns the padded vocabulary size: the smallest multiple of 16 x `tensor` that is at least `vocabulary`.

    One rank holds the vocabulary as it is, without padding.

    `build_model` builds the embedding and the LM head of this size. `models/fusion.py` adds the padding, which is rows
    of zeros, when it loads weights, and removes it when it exports them. The loss and `top_candidates` ignore the
    logits of padding.
    """
    unit = VOCABULARY_UNIT * tensor if tensor > 1 else 1
    return -(-vocabulary // unit) * unit


def last_stage_layers(layers: int, pipeline: int) -> int:
    """Returns the number of layers on the last pipeline stage; the other stages share the rest equally.

    The last stage also holds the LM head, so it gets fewer layers than the others if possible.
    """
    share = -(-layers // pipeline)
    left = layers - share * (pipeline - 1)
    return left if left > 0 else layers - (layers // pipeline) * (pipeline - 1)
