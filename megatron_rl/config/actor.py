"""The `actor` section: device, parallelism, precision and optimizer of the trained policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .fields import Betas, Count, NonNegative, Positive, PositiveInt, Section, ShareOrZero

Fp8 = Literal["none", "blockwise", "tensorwise"]

ExpertGemm = Literal["auto", "grouped", "sequential"]

AttentionBackend = Literal["auto", "flash", "fused", "unfused", "local"]
"""Attention kernels, by Megatron's names."""

Switch = Literal["auto"] | bool

RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
"""Parts of a layer that Megatron can recompute, by Megatron's names."""


class OptimizerSettings(Section):
    """AdamW and its learning-rate schedule."""

    lr: Positive = 1e-6
    """Peak learning rate."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: Positive = 1e-8
    """Constant added to the square root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm. 0 disables clipping."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate between warm-up and the last step."""
    min_lr_ratio: ShareOrZero = 0.0
    """Learning rate at the last step, as a fraction of lr. Used by the linear and cosine schedules only."""


_MLP: list[RecomputeModule] = ["mlp"]


class RecomputeSettings(Section):
    """Activation recomputation: saves memory by running part of the forward pass again during the backward pass."""

    granularity: Literal["none", "selective", "full"] = "none"
    """selective: recompute the `modules` of each layer. full: recompute complete layers and keep only their inputs."""
    modules: list[RecomputeModule] = Field(default_factory=_MLP.copy, min_length=1)
    """Parts to recompute with `granularity: selective`. The MLP holds most of a dense layer's activations. core_attn
    pays off only if the attention implementation keeps its probabilities."""


class FusionSettings(Section):
    """Fused kernels on GPUs. auto: used if device and packages have them; the first lines of a run say which. true: the
    run is refused without. false: not used. A CPU has none of them."""

    rope: Switch = "auto"
    """Rotary embeddings of packed sequences in one kernel of Transformer Engine; otherwise the host waits for the GPU
    several times per layer."""
    swiglu: Switch = "auto"
    """SwiGLU in one kernel, which torch compiles. Saves one feed-forward tensor per layer."""
    gradient_accumulation: Switch = "auto"
    """Transformer Engine's matrix products add weight gradients to the fp32 sum directly, without rounding to bf16."""
    expert_permutation: Switch = "auto"
    """Tokens are sorted by expert in one kernel of Transformer Engine."""


class ActorSettings(Section):
    """The Megatron actor: device, parallel sizes, precision, optimizer."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if a GPU is available, cpu otherwise."""
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size: ranks that share each layer."""
    pipeline_parallel: PositiveInt = 1
    """Pipeline-parallel size: ranks among which the layers are divided."""
    virtual_pipeline: PositiveInt = 1
    """Chunks of layers per pipeline rank. More than one selects Megatron's interleaved schedule, in which ranks wait
    less for each other but send more. Not available for padded rows."""
    data_parallel: PositiveInt = 1
    """Data-parallel size: copies of the model, each of which trains on its part of a step's sequences."""
    context_parallel: PositiveInt = 1
    """Context-parallel size: ranks that share each sequence, for long sequences. Needs packed rows, and Transformer
    Engine on CUDA."""
    sequence_parallel: bool = False
    """Sequence parallelism: outside the tensor-parallel parts of a layer, each tensor-parallel rank keeps only its part
    of the sequence. This saves activation memory at the same communication volume. Needs tensor_parallel above 1."""
    expert_parallel: PositiveInt = 1
    """Expert-parallel size: ranks among which the experts of a mixture are divided. They are taken from the tensor- and
    data-parallel ranks."""
    expert_gemm: ExpertGemm = "auto"
    """grouped: compute the experts of a rank in one grouped matrix product, which needs Transformer Engine on CUDA.
    sequential: compute them one after another. auto: grouped if available."""
    fp8: Fp8 = "none"
    """Compute the matrix products of the layers in FP8, scaled per block (E4M3) or per tensor (hybrid). Weights and
    everything else stay in bfloat16. Needs Transformer Engine on CUDA with compute capability 8.9 or later."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and activations in the forward and backward passes."""
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens, including prompts, in one forward pass. A longer sequence forms a micro-batch of its own."""
    rows: Literal["auto", "prefix_tree", "packed", "padded"] = "auto"
    """Layout of the sequences of a micro-batch. prefix_tree: common prefixes of sequences, prompts above all, are
    computed once; with Transformer Engine's layers FlexAttention attends to them, which has not been run on a GPU yet.
    packed: sequences follow each other without padding. padded: one row per sequence, padded to the same length. auto:
    prefix_tree, or packed with Transformer Engine."""
    lm_head: Literal["fused", "materialised"] = "fused"
    """fused: the loss projects one chunk of sampled tokens at a time and keeps no logits. materialised: the logits of
    all sampled tokens of a micro-batch are held in memory: sampled tokens x vocabulary / tensor_parallel values."""
    attention_backend: AttentionBackend = "auto"
    """Attention kernel of Transformer Engine's layers. auto: Transformer Engine chooses. flash: FlashAttention. fused:
    cuDNN. unfused: plain matrix products. local: for layers without Transformer Engine, whose attention is torch's."""
    fusions: FusionSettings = FusionSettings()
    """Fused kernels on GPUs."""
    overlap_grad_reduce: Switch = "auto"
    """Sum gradients over replicas while the last micro-batch's backward pass goes on. auto: on GPUs. No effect with one
    replica."""
    deterministic: bool = False
    """Use only kernels and sums on GPUs that give the same bits when a run is repeated, so that a resumed run equals an
    uninterrupted one exactly. Slower. A CPU always does."""
    recompute: RecomputeSettings = RecomputeSettings()
    """Activations that the backward pass recomputes instead of keeping."""
    distributed_optimizer: bool = True
    """Each data-parallel rank keeps and updates only its part of the optimizer state. No effect if data_parallel is
    1."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory except during the optimizer step. No effect on a CPU."""
    pad_vocabulary: bool = True
    """With tensor_parallel above 1, pad the vocabulary to a multiple of 16 x tensor_parallel, so that every rank's part
    has a size that GPUs read fast. false: refuse a vocabulary that is not such a multiple."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer of the RL phase. warm_start has its own settings."""

    @property
    def world_size(self) -> int:
        """Number of actor processes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel
