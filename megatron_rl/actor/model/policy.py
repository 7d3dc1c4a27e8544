"""Builds this rank's part of a Hugging Face model as a Megatron GPTModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import silu

from megatron_rl.actor import platform
from megatron_rl.actor.model.layers import stage_layers
from megatron_rl.actor.model.rope import ScaledRope
from megatron_rl.actor.model.tree_attention import TreePacking
from megatron_rl.actor.platform.gpu import NO_FUSIONS, Fusions, fuse_gradient_accumulation
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layout_check import validate_layout
from megatron_rl.models.weight_map import kind_of
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout, last_stage_layers, padded_vocabulary

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings, AttentionBackend, ExpertGemm, Fp8, RecomputeSettings


class PolicyModel(GPTModel):
    """A GPTModel whose last stage can stop before the LM head, so that the loss projects only the tokens it needs."""

    def forward(self, *args: Any, project: bool = True, **settings: Any) -> Tensor:
        """Runs the stage.

        The last stage returns logits [b, s, padded vocabulary / TP] like GPTModel. With `project=False` it returns the
        hidden states [s, b, d] after the final norm; under sequence parallelism, this rank's part of s. Earlier stages
        return the input of the next stage.
        """
        self._project = project
        output: Tensor = super().forward(*args, **settings)
        return output

    def _preprocess(self, **inputs: Any) -> tuple[Any, ...]:
        """Selects rotary frequencies by position if sequences share positions, which are then not consecutive."""
        hidden, frequencies, *rest = super()._preprocess(**inputs)
        if isinstance(inputs["packed_seq_params"], TreePacking):
            frequencies = frequencies[inputs["position_ids"][0]]
        return hidden, frequencies, *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **settings: Any) -> Tensor:
        output: Tensor = super()._postprocess(hidden_states, *args, **settings) if self._project else hidden_states
        return output

    @property
    def head_weight(self) -> nn.Parameter:
        """The LM head's weight [padded vocabulary / TP, d] on the last stage.

        The embedding's weight if the two are tied and on one stage.
        """
        weight: nn.Parameter = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight


@dataclass(frozen=True, slots=True)
class Kernels:
    """How the layers compute. The defaults run on every device."""

    recompute: RecomputeSettings | None = None
    fp8: Fp8 = "none"
    expert_gemm: ExpertGemm = "auto"
    attention: AttentionBackend = "auto"
    flex: bool = False
    """Whether FlexAttention attends over prefix trees; the layers then take nothing else."""
    fusions: Fusions = NO_FUSIONS
    deterministic: bool = False

    @classmethod
    def of(cls, settings: ActorSettings, device: torch.device, model: Architecture) -> Kernels:
        """Returns what the settings ask for on this device. Raises UserError as `platform.fusions` does."""
        return cls(
            recompute=settings.recompute,
            fp8=settings.fp8,
            expert_gemm=settings.expert_gemm,
            attention=platform.attention(settings, device),
            flex=platform.uses_flex(settings, device),
            fusions=platform.fusions(settings, device, experts=model.experts is not None),
            deterministic=settings.deterministic and device.type == "cuda",
        )


def build_model(
    hf_config: Mapping[str, Any],
    *,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    pad_vocabulary: bool = True,
    kernels: Kernels | None = None,
    chunk: int = 0,
) -> PolicyModel:
    """Returns this rank's pipeline stage on `device`, or under the interleaved schedule its `chunk`, counted from 0.

    The weights are not initialised; load them with `models.weight_map.load_hf_weights`.

    The last stage's logits are [batch, length, padded vocabulary / tensor]. Micro-batches are [batch, length], padded
    on the right, or packed [1, T] with PackedSeqParams(qkv_format="thd"). The attention mask is always None.

    Raises UserError as `validate_layout` does.
    """
    validate_layout(hf_config, layout, pad_vocabulary)
    model = Architecture.from_hf(hf_config)
    kernels = kernels or Kernels()
    config = transformer_config(model, layout, dtype, device, kernels)
    rope = None if model.rope_type == "default" else ScaledRope.of(hf_config, model.rope_type)
    if rope:
        rope.scale_attention(config)
    gpt = PolicyModel(
        config,
        stage_layers(config, model.output_bias, device, chunk, kernels.flex),
        vocab_size=padded_vocabulary(model.vocabulary, layout.tensor),
        max_sequence_length=model.max_positions,
        pre_process=process_groups.is_first_stage() and chunk == 0,
        post_process=process_groups.is_last_stage() and chunk == layout.virtual_pipeline - 1,
        share_embeddings_and_output_weights=model.tied,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        vp_stage=chunk if layout.virtual_pipeline > 1 else None,
    )
    if rope:
        rope.set_frequencies(gpt)
    mark_shards(gpt, model)
    if kernels.fusions.gradient_accumulation:
        fuse_gradient_accumulation(gpt)
    return gpt.to(device)


def transformer_config(
    model: Architecture,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
) -> TransformerConfig:
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        **_moe_settings(model, kernels.expert_gemm, platform.uses_transformer_engine(device, dtype)),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context,
        **_interleaving(layout),
        num_layers_in_last_pipeline_stage=(
            last_stage_layers(model.layers, layout.pipeline) if model.layers % layout.pipeline else None
        ),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Losses are normalised over the global batch: gradients are summed over ranks and micro-batches, not divided.
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        **_recompute_settings(kernels.recompute),
        **_FP8[kernels.fp8],
        **kernels.fusions.config,
        attention_backend=AttnBackend[kernels.attention],
        deterministic_mode=kernels.deterministic,
        masked_softmax_fusion=False,  # for attention with a mask, which no layer here uses
        bias_dropout_fusion=False,  # there is neither a bias nor dropout
    )


def _moe_settings(model: Architecture, expert_gemm: ExpertGemm, transformer_engine: bool) -> dict[str, Any]:
    """Returns settings that route as in the model's training, in fp32, with no load balancing and no dropped tokens."""
    experts = model.experts
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.count,
        moe_ffn_hidden_size=experts.ffn,
        moe_layer_freq=[int(sparse) for sparse in experts.layers],
        moe_router_topk=experts.per_token,
        moe_router_pre_softmax=not experts.normalised,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=transformer_engine and expert_gemm != "sequential",
    )


def _interleaving(layout: Layout) -> dict[str, Any]:
    if layout.virtual_pipeline == 1:
        # Packed micro-batches differ in length, so stages must exchange lengths. That requires the alltoall dispatcher.
        return dict(variable_seq_lengths=layout.pipeline > 1)
    # With batched messages the interleaved schedule computes wrong gradients without any error.
    return dict(
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline, overlap_p2p_comm=True, batch_p2p_comm=False
    )


_FP8: dict[Fp8, dict[str, Any]] = {
    "none": {},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
}


def _recompute_settings(recompute: RecomputeSettings | None) -> dict[str, Any]:
    if recompute is None or recompute.granularity == "none":
        return {}
    if recompute.granularity == "full":
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return dict(recompute_granularity="selective", recompute_modules=list(recompute.modules))


def mark_shards(model: GPTModel, architecture: Architecture) -> None:
    """Marks the weights that are shards, and only these: the gradient norm counts the others on the first TP rank only.

    Which weights are shards follows from the weight map, because marks differ between releases: megatron-core marks
    weights when it initialises them, which is skipped here, and Transformer Engine marks grouped experts or not.
    """
    for name, parameter in model.named_parameters():
        kind = kind_of(model, architecture, name)
        parameter.tensor_model_parallel = kind != "replicated"
        parameter.partition_dim = {"replicated": -1, "row": 1}.get(kind, 0)
        parameter.partition_stride = 1
