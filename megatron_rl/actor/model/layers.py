"""Which modules a transformer layer is made of: Transformer Engine's where it is installed, else Megatron's local ones
with the attention and the norm of this project plugged in."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.actor import platform
from megatron_rl.actor.model.attention import SDPAttention


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm for Megatron's local layers. Unlike the stock one, this class allows sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each rank sees only its part of the tokens; Megatron sums the gradients of the
        # weights that carry this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def stage_layers(
    config: TransformerConfig, output_bias: bool, device: torch.device, chunk: int
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, or of one chunk of it under the interleaved schedule. `output_bias`: of
    the attention's output projection."""
    engine = platform.uses_transformer_engine(device, config.params_dtype)
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=engine,
        normalization="RMSNorm",
        vp_stage=None if config.virtual_pipeline_model_parallel_size is None else chunk,
    )
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        if not engine:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            attention.core_attention = SDPAttention
            if _has_experts(layer.submodules.mlp):  # as with Transformer Engine, whose checkpoints these then are
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        if output_bias:
            attention.linear_proj = _with_bias(attention.linear_proj)
    if not engine:
        block.layer_norm = RMSNorm
    return block


def _has_experts(mlp: Any) -> bool:
    """`mlp` is how Megatron specifies a layer's: a ModuleSpec, or in newer releases a partial call."""
    return (mlp.func if isinstance(mlp, partial) else mlp.module) is MoELayer


def _with_bias(linear: type) -> type:
    """Megatron has a bias in every linear layer or in none but the fused QKV; this one has its own."""
    if getattr(linear, "has_own_bias", False):
        return linear  # layers share their specification

    class BiasedLinear(linear):
        has_own_bias = True

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"bias": True}))

    return BiasedLinear
