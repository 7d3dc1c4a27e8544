"""The `actor` section: where and how the policy is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Betas, Count, NonNegative, Positive, PositiveInt, Section, ShareOrZero

Fp8 = Literal["none", "blockwise", "tensorwise"]

ExpertGemm = Literal["auto", "grouped", "sequential"]

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
"""Parts of a layer that Megatron can compute again, by its names."""


class OptimizerSettings(Section):
    """AdamW and its schedule."""

    lr: Positive = 1e-6
    """Peak learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 for no clipping."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate between warm-up and the last step."""
    min_lr_ratio: ShareOrZero = 0.0
    """Learning rate at the last step, as a share of lr; read only where the schedule decays."""


_MLP: list[RecomputeModule] = ["mlp"]


class RecomputeSettings(Section):
    """Memory for time: the forward of the named parts runs a second time within the backward."""

    granularity: Literal["none", "selective", "full"] = "none"
    """selective: `modules` of each layer; full: whole layers, keeping only what goes into each."""
    modules: list[RecomputeModule] = Field(default_factory=_MLP.copy, min_length=1)
    """Read with `granularity: selective`. The MLP holds most of a dense layer's activations; core_attn is worth its
    time only where attention keeps its probabilities."""


class ActorSettings(Section):
    """The Megatron actor: device, parallel sizes, precision, optimizer."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU, else cpu."""
    tensor_parallel: PositiveInt = 1
    """Ranks that share each layer."""
    pipeline_parallel: PositiveInt = 1
    """Ranks that share the layers out between them."""
    virtual_pipeline: PositiveInt = 1
    """Chunks of layers on each pipeline rank. More than one: Megatron's interleaved schedule, in which ranks wait less
    for each other and send more. Not for padded rows."""
    data_parallel: PositiveInt = 1
    """Copies of the model; each takes its part of a step's rows."""
    context_parallel: PositiveInt = 1
    """Ranks that share each sequence, for long ones. Needs packed rows, and Transformer Engine on CUDA."""
    sequence_parallel: bool = False
    """Between the tensor-parallel parts of a layer, each of their ranks keeps only its part of the sequence: less
    activation memory for the same communication. Needs tensor_parallel above 1."""
    expert_parallel: PositiveInt = 1
    """Ranks that share the experts of a mixture out between them; they are of the tensor- and data-parallel ones."""
    expert_gemm: ExpertGemm = "auto"
    """A rank's experts in one grouped matrix product, which needs Transformer Engine on CUDA, or one after another;
    auto: grouped where that is there."""
    fp8: Fp8 = "none"
    """Matrix products of the layers in FP8, scaled by block (E4M3) or by tensor (hybrid), weights and all else in
    bfloat16. Needs Transformer Engine on CUDA of compute capability 8.9 or later."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations in forward and backward."""
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens, prompts included, in one forward pass; a longer row goes alone."""
    rows: Literal["auto", "prefix_tree", "packed", "padded"] = "auto"
    """How the rows of a micro-batch lie together. prefix_tree: what several have in common from their start, their
    prompt above all, is run once; not with Transformer Engine. packed: one after another, without padding. padded: side
    by side. auto: prefix_tree, or packed with Transformer Engine."""
    lm_head: Literal["fused", "materialised"] = "fused"
    """fused: the loss projects a chunk of response tokens at a time, and no logits are kept; materialised: the logits
    of a micro-batch's response tokens are whole, which takes their number times vocabulary / tensor_parallel."""
    recompute: RecomputeSettings = RecomputeSettings()
    """Activations that the backward computes again instead of keeping."""
    distributed_optimizer: bool = True
    """Each data-parallel rank keeps and steps only its part of the optimizer's state; no effect with one copy."""
    offload_optimizer: bool = False
    """The optimizer's state is in host memory except while it steps; no effect on a CPU, where it is already."""
    pad_vocabulary: bool = True
    """Pad the vocabulary to a multiple of tensor_parallel; false: refuse one that does not divide."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Of the RL phase; warm_start has its own."""

    @property
    def world_size(self) -> int:
        """Actor processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel
