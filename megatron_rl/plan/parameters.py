"""Number of parameters on each rank. `tests/unit/plan` compares it with the models that the actor builds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.models.architecture import Architecture
from megatron_rl.parallel.layout import Layout, last_stage_layers, padded_vocabulary


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of one rank, by the ranks that hold copies of them."""

    dense: int
    """Parameters that every data-parallel and context-parallel rank replicates."""
    experts: int
    """Parameters that only ranks with the same experts replicate."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


def stage_layers(model: Architecture, layout: Layout) -> list[range]:
    """Returns the layers of each pipeline stage."""
    last = last_stage_layers(model.layers, layout.pipeline)
    each = (model.layers - last) // max(1, layout.pipeline - 1)
    first = [range(stage * each, (stage + 1) * each) for stage in range(layout.pipeline - 1)]
    return [*first, range(model.layers - last, model.layers)]


def rank_parameters(model: Architecture, layout: Layout, stage: int) -> Parameters:
    """Returns the parameters of a tensor-parallel rank in a pipeline stage; all have the same number."""
    layers = stage_layers(model, layout)[stage]
    last = stage == layout.pipeline - 1
    dense = stage_tables(model, layout, stage) + model.hidden * last  # the last norm
    experts = 0
    for layer in layers:
        dense += _attention(model, layout.tensor) + 2 * model.hidden
        if model.experts is not None and model.is_sparse(layer):
            dense += model.hidden * model.experts.count  # the router
            here = model.experts.count // layout.expert
            experts += here * 3 * model.hidden * model.experts.ffn // layout.expert_tensor
        else:
            dense += 3 * model.hidden * model.ffn // layout.tensor
    return Parameters(dense, experts)


def stage_tables(model: Architecture, layout: Layout, stage: int) -> int:
    """Returns the parameters of embedding and LM head on a tensor-parallel rank in a pipeline stage."""
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (model.tied and first and last)
    return tables * (padded_vocabulary(model.vocabulary, layout.tensor) // layout.tensor) * model.hidden


def model_parameters(model: Architecture) -> int:
    """Returns the number of the model's parameters without padding; tied embeddings count once."""
    return rank_parameters(model, Layout(), 0).total


def _attention(model: Architecture, tensor: int) -> int:
    query, key_value = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = model.hidden * (2 * query + 2 * key_value) // tensor
    biases = model.qkv_bias * (query + 2 * key_value) // tensor + model.output_bias * model.hidden
    return weights + biases + model.qk_norm * 2 * model.head_dim
