"""How many parameters a rank holds. `tests/unit/plan` compares with the models that the actor builds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.models.architecture import Architecture
from megatron_rl.parallel.layout import Layout, last_stage_layers, padded_vocabulary


@dataclass(frozen=True, slots=True)
class Parameters:
    """Of one rank, by how many ranks hold the same."""

    dense: int
    """Held again by every data-parallel (and context-parallel) rank."""
    experts: int
    """Held again only where the same experts are."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


def stage_layers(model: Architecture, layout: Layout) -> list[range]:
    """The layers of each pipeline stage."""
    last = last_stage_layers(model.layers, layout.pipeline)
    each = (model.layers - last) // max(1, layout.pipeline - 1)
    first = [range(stage * each, (stage + 1) * each) for stage in range(layout.pipeline - 1)]
    return [*first, range(model.layers - last, model.layers)]


def rank_parameters(model: Architecture, layout: Layout, stage: int) -> Parameters:
    """Of any tensor-parallel rank of a pipeline stage."""
    layers = stage_layers(model, layout)[stage]
    vocabulary = padded_vocabulary(model.vocabulary, layout.tensor) // layout.tensor * model.hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    tables = first + last - (model.tied and first and last)
    dense = tables * vocabulary + model.hidden * last  # the last norm
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


def model_parameters(model: Architecture) -> int:
    """The whole model's, without padding; tied tables once."""
    return rank_parameters(model, Layout(), 0).total


def _attention(model: Architecture, tensor: int) -> int:
    query, key_value = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = model.hidden * (2 * query + 2 * key_value) // tensor
    biases = model.qkv_bias * (query + 2 * key_value) // tensor + model.output_bias * model.hidden
    return weights + biases + model.qk_norm * 2 * model.head_dim
