"""Checks that a model can be split under a layout, and has what the settings ask for. Reads the model's config.json
only, so a dry run can call it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_rl.config import Config
from megatron_rl.config.actor import FusionSettings
from megatron_rl.config.kernels import missing_fusion
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.published import known_config, published_config
from megatron_rl.parallel.layout import VOCABULARY_UNIT, Layout, layout_of, padded_vocabulary


def check_layout(config: Config) -> None:
    """Raises UserError if the configured model cannot be split under the configured layout, or lacks the experts that a
    kernel is for.

    A published model that is not here yet is checked by its published config. A model that `prepare` has yet to write
    is not checked.
    """
    path = config.model.path
    if path.exists() or published_config(path) is not None:
        hf_config = known_config(path)
        validate_layout(hf_config, layout_of(config.actor), config.actor.pad_vocabulary)
        check_experts_wanted(hf_config, config.actor.fusions)


def check_experts_wanted(hf_config: Mapping[str, Any], fusions: FusionSettings) -> None:
    """Raises UserError if a fused kernel of experts is asked for and the model has none."""
    if fusions.expert_permutation is True and Architecture.from_hf(hf_config).experts is None:
        raise UserError(missing_fusion("expert_permutation"))


def validate_layout(hf_config: Mapping[str, Any], layout: Layout, pad_vocabulary: bool) -> None:
    """Raises UserError if the model cannot be split this way. The message gives the nearest values that work."""
    model = Architecture.from_hf(hf_config)
    _check_degrees(layout)
    _check_tensor(model, layout.tensor)
    _check_experts(model, layout)
    if layout.pipeline > model.layers:
        raise UserError(f"actor.pipeline_parallel is {layout.pipeline}, but the model has only {model.layers} layers.")
    _check_chunks(model, layout)
    if not pad_vocabulary and model.vocabulary != padded_vocabulary(model.vocabulary, layout.tensor):
        fitting = {
            n for n in _divisors(_head_unit(model)) if padded_vocabulary(model.vocabulary, n) == model.vocabulary
        }
        raise UserError(
            f"actor.tensor_parallel is {layout.tensor}, and the vocabulary of {model.vocabulary} tokens is no multiple "
            f"of {VOCABULARY_UNIT} x tensor_parallel. Set actor.pad_vocabulary to true, or change tensor_parallel. "
            f"{_nearest(layout.tensor, fitting)}"
        )


def _check_degrees(layout: Layout) -> None:
    for name in ("tensor", "pipeline", "data", "context", "expert"):
        if getattr(layout, name) < 1:
            raise UserError(f"actor.{name}_parallel is {getattr(layout, name)}; it must be 1 or more.")
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        raise UserError(
            f"actor.virtual_pipeline is {layout.virtual_pipeline}, but it interleaves chunks of layers between "
            "pipeline ranks, and actor.pipeline_parallel is 1. Raise pipeline_parallel, or set virtual_pipeline to 1."
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise UserError(
            "actor.sequence_parallel splits sequences over tensor-parallel ranks, and actor.tensor_parallel is 1. "
            "Raise tensor_parallel, or set sequence_parallel to false."
        )


def _check_chunks(model: Architecture, layout: Layout) -> None:
    chunks = layout.pipeline * layout.virtual_pipeline
    if layout.virtual_pipeline > 1 and model.layers % chunks:
        fitting = [n for n in _divisors(model.layers) if model.layers % (n * layout.pipeline) == 0]
        raise UserError(
            f"actor.virtual_pipeline is {layout.virtual_pipeline}, and actor.pipeline_parallel x virtual_pipeline = "
            f"{chunks} does not divide the model's {model.layers} layers. {_nearest(layout.virtual_pipeline, fitting)}"
        )


def _check_tensor(model: Architecture, tensor: int) -> None:
    sizes = {"attention heads": model.heads, "key/value heads": model.kv_heads, "feed-forward size": model.ffn}
    for what, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"actor.tensor_parallel is {tensor}, which does not divide the model's {what} ({size}). "
                f"{_nearest(tensor, _divisors(_head_unit(model)))}"
            )


def _check_experts(model: Architecture, layout: Layout) -> None:
    if model.experts is None:
        if layout.expert > 1:
            raise UserError(
                f"actor.expert_parallel is {layout.expert}, but the model is dense and has no experts. "
                "Set expert_parallel to 1."
            )
        return
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise UserError(
            f"actor.tensor_parallel is {layout.tensor} and actor.sequence_parallel is false, but a model with experts "
            "needs sequence parallelism if it uses tensor parallelism. Set actor.sequence_parallel to true, or "
            "actor.tensor_parallel to 1."
        )
    count, ranks = model.experts.count, layout.tensor * layout.data * layout.context
    for what, number in ((f"experts ({count})", count), (f"ranks of a pipeline stage ({ranks})", ranks)):
        if number % layout.expert:
            raise UserError(
                f"actor.expert_parallel is {layout.expert}, which does not divide the model's {what}. "
                f"{_nearest(layout.expert, set(_divisors(count)) & set(_divisors(ranks)))}"
            )
    if model.experts.ffn % layout.expert_tensor:
        fitting = _divisors(math.gcd(_head_unit(model), model.experts.ffn))
        raise UserError(
            f"actor.tensor_parallel is {layout.tensor}, which does not divide the experts' feed-forward size "
            f"({model.experts.ffn}). {_nearest(layout.tensor, fitting)}"
        )


def _head_unit(model: Architecture) -> int:
    """Returns the number that tensor_parallel must divide, apart from the vocabulary."""
    return math.gcd(model.heads, model.kv_heads, model.ffn)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _nearest(value: int, choices: Iterable[int]) -> str:
    below = [c for c in choices if c < value]
    above = [c for c in choices if c > value]
    nearest = ([max(below)] if below else []) + ([min(above)] if above else [])
    return f"Nearest values that work: {', '.join(map(str, nearest)) or 'none'}."
