"""The modules of a transformer layer: Transformer Engine's if available, otherwise Megatron's local ones.

The local layers use this project's attention and norm.
"""

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
    config: TransformerConfig, output_bias: bool, device: torch.device, chunk: int, flex: bool = False
) -> TransformerBlockSubmodules:
    """Returns the layers of this rank's pipeline stage, or of one chunk of it under the interleaved schedule.

    output_bias: whether the attention's output projection has a bias. flex: whether FlexAttention attends over prefix
    trees, in place of the attention that belongs to the layers.
    """
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
            if _has_experts(layer.submodules.mlp):  # use the checkpoint names of Transformer Engine's layers
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        if flex:
            from megatron_rl.actor.model.flex_tree import FlexTreeAttention

            attention.core_attention = FlexTreeAttention
        if output_bias:
            attention.linear_proj = _with_bias(attention.linear_proj)
    if not engine:
        block.layer_norm = RMSNorm
    return block


def _has_experts(mlp: Any) -> bool:
    """Returns whether an MLP has experts. Megatron specifies it by a ModuleSpec, newer releases by a partial call."""
    return (mlp.func if isinstance(mlp, partial) else mlp.module) is MoELayer


def _with_bias(linear: type) -> type:
    """Returns a linear layer with a bias.

    Megatron itself can give a bias to every linear layer or to the fused QKV only.
    """
    if getattr(linear, "has_own_bias", False):
        return linear  # layers share one specification, so another layer has already replaced this class

    class BiasedLinear(linear):
        has_own_bias = True

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"bias": True}))

    return BiasedLinear
