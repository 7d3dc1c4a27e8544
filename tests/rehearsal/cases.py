"""The cases of the rehearsal: models, layouts and ways to compute, and the families whose names are checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hf_models import config_json, write_hf_model

SHAPE: dict[str, Any] = dict(
    vocab_size=259, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "llama": ("llama", {"attention_bias": True}),
    "experts": ("qwen3_moe", EXPERTS),
}
"""Name -> model type and settings of the models that are trained. The vocabulary is odd: tensor parallelism pads it."""
ROWS = {"count": 8, "prompt": 20, "response": 40, "vocabulary": 259}
BASE = {"device": "cuda", "dtype": "bfloat16", "micro_batch_tokens": 256}
UNFUSED = {"fusions": dict.fromkeys(("rope", "swiglu", "gradient_accumulation", "expert_permutation"), False)}


@dataclass(frozen=True)
class Case:
    """A few training steps, which must be those of the local layers in fp32."""

    model: str = "qwen3"
    actor: dict[str, Any] = field(default_factory=dict)


TP_SP = {"tensor_parallel": 2, "sequence_parallel": True}
TREE = {"rows": "prefix_tree"}
STEPS: dict[str, Case] = {
    "one rank": Case(),
    "no fused kernels": Case(actor=UNFUSED),
    "tensor": Case(actor={"tensor_parallel": 2}),
    "tensor and sequence": Case(actor=TP_SP),
    "tensor and sequence, no fused kernels": Case(actor=TP_SP | UNFUSED),
    "pipeline": Case(actor={"pipeline_parallel": 2}),
    "interleaved pipeline": Case(actor={"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "replicas": Case(actor={"data_parallel": 2}),
    "replicas, whole optimizer each": Case(actor={"data_parallel": 2, "distributed_optimizer": False}),
    "context": Case(actor={"context_parallel": 2}),
    "context, no fused kernels": Case(actor={"context_parallel": 2} | UNFUSED),
    "context and tensor": Case(actor={"context_parallel": 2, "tensor_parallel": 2}),
    "offloaded optimizer": Case(actor={"offload_optimizer": True}),
    "layers recomputed": Case(actor={"recompute": {"granularity": "full"}}),
    "feed-forward recomputed": Case(actor={"recompute": {"granularity": "selective"}}),
    "materialised head": Case(actor={"lm_head": "materialised"}),
    "padded rows": Case(actor={"rows": "padded"}),
    "prefix tree": Case(actor=TREE),
    "prefix tree, no fused kernels": Case(actor=TREE | UNFUSED),
    "prefix tree, tensor and sequence": Case(actor=TREE | TP_SP),
    "prefix tree, pipeline": Case(actor=TREE | {"pipeline_parallel": 2}),
    "prefix tree, interleaved pipeline": Case(actor=TREE | {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "prefix tree, replicas": Case(actor=TREE | {"data_parallel": 2}),
    "prefix tree, layers recomputed": Case(actor=TREE | {"recompute": {"granularity": "full"}}),
    "prefix tree, experts over ranks": Case("experts", TREE | {"data_parallel": 2, "expert_parallel": 2}),
    "qwen2, pipeline": Case("qwen2", {"pipeline_parallel": 2}),
    "llama, tensor and sequence": Case("llama", TP_SP),
    "experts": Case("experts"),
    "experts, no fused kernels": Case("experts", UNFUSED),
    "experts one by one": Case("experts", {"expert_gemm": "sequential"}),
    "experts, tensor": Case("experts", TP_SP),
    "experts over ranks": Case("experts", {"data_parallel": 2, "expert_parallel": 2}),
    "experts over tensor ranks": Case("experts", TP_SP | {"expert_parallel": 2}),
    "experts over ranks, no fused kernels": Case("experts", {"data_parallel": 2, "expert_parallel": 2} | UNFUSED),
}
"""On the newest pair of versions."""
SMOKE = {"qwen3": Case("qwen3", TP_SP), "experts": Case("experts", TP_SP)}
"""On every pair of versions."""
LOCAL = {"qwen3": Case("qwen3"), "experts": Case("experts"), "experts, tensor": Case("experts", TP_SP)}
"""On CUDA without Transformer Engine."""
CPU_WITH_ENGINE = {"qwen3": Case("qwen3"), "experts": Case("experts")}
"""On a CPU where Transformer Engine is installed, whose kernels and optimizer need CUDA."""

STATES: dict[str, Case] = {
    "replicas": Case(actor={"data_parallel": 2}),
    "tensor and sequence, pipeline": Case(actor=TP_SP | {"pipeline_parallel": 2}),
    "experts over ranks": Case("experts", {"data_parallel": 2, "expert_parallel": 2}),
    "offloaded optimizer": Case(actor={"offload_optimizer": True}),
}
"""Layouts under which weights, snapshots and checkpoints go out and come back."""
METHOD_LAYOUTS = {"one rank": Case(), "tensor and sequence": Case(actor=TP_SP)}
"""Layouts under which every method is computed."""
WAITS = {
    "qwen3": Case(),
    "tensor and sequence": Case(actor=TP_SP),
    "context": Case(actor={"context_parallel": 2}),
    "experts": Case("experts"),
    "prefix tree": Case(actor=TREE),
}
"""Layouts under which waits are counted."""

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3": ("qwen3", {}, {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}, {}),
    "qwen2": ("qwen2", {}, {}),
    "llama": ("llama", {}, {}),
    "llama, biased": ("llama", {"attention_bias": True}, {}),
    "experts": ("qwen3_moe", {}, {}),
    "experts one by one": ("qwen3_moe", {}, {"expert_gemm": "sequential"}),
    "some layers with experts": ("qwen3_moe", {"mlp_only_layers": [0]}, {}),
    "FP8 by block": ("qwen3", {}, {"fp8": "blockwise"}),
    "FP8 by tensor": ("qwen3", {}, {"fp8": "tensorwise"}),
    "experts in FP8": ("qwen3_moe", {}, {"fp8": "blockwise"}),
}
"""Name -> model type, its settings, settings of the actor."""
NAMES_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_model(folder: Path, name: str, seed: int = 0) -> Path:
    model_type, settings = MODELS[name]
    return write_hf_model(folder, model_type, seed=seed, noise=0.02, **(SHAPE | settings))


def family_config(name: str) -> dict[str, Any]:
    model_type, settings, _ = FAMILIES[name]
    return config_json(model_type, **NAMES_SHAPE, **({"head_dim": 32} if "qwen3" in model_type else {}), **settings)
