"""Bytes of activations per token of a micro-batch on one rank.

The tensors that a layer keeps for its backward are listed one by one. For Megatron's local layers the list is what
autograd was seen to save on the CPU (`tests/unit/plan` measures it). For Transformer Engine layers the list follows the
source code and has not been confirmed on a GPU. Symbols: b bytes per element, t tensor-parallel ranks, s ranks that
share a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.actor import RecomputeSettings
from megatron_rl.models.architecture import Architecture
from megatron_rl.parallel.layout import Layout

FP32 = 4


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of one rank's part of a layer, in elements per token."""

    hidden: float
    """Hidden size where each rank holds the complete sequence."""
    shared: float
    """Hidden size per rank where sequence parallelism divides the sequence."""
    query: float
    key: float
    heads: float
    key_heads: float
    ffn: float
    """Width of the dense MLP, or of all experts that a token is routed to."""

    @classmethod
    def of(cls, model: Architecture, layout: Layout, layer: int) -> Widths:
        t, s = layout.tensor, layout.tensor if layout.sequence_parallel else 1
        experts = model.experts if model.is_sparse(layer) else None
        ffn = experts.ffn * experts.per_token / layout.expert_tensor if experts else model.ffn / t
        return cls(
            hidden=model.hidden,
            shared=model.hidden / s,
            query=model.heads * model.head_dim / t,
            key=model.kv_heads * model.head_dim / t,
            heads=model.heads / t,
            key_heads=model.kv_heads / t,
            ffn=ffn,
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """Activation bytes of a layer per token."""

    kept: float
    """Bytes kept from the layer's forward to its backward."""
    recomputed: float
    """Bytes that recompute restores, for one layer at a time."""
    backward: float
    """Bytes of gradients within the layer's backward, beyond what the backward has freed."""
    forward: float
    """Peak bytes within a forward without gradients."""


def layer_bytes(
    model: Architecture,
    layout: Layout,
    layer: int,
    *,
    b: int,
    recompute: RecomputeSettings,
    transformer_engine: bool,
    fused_swiglu: bool = False,
) -> Layer:
    """Returns the activation bytes of a layer on one rank. b: bytes per element.

    SwiGLU reads 2 tensors of the feed-forward width and the next product reads its result. Without the fused kernel the
    factors of its product are kept too.
    """
    w = Widths.of(model, layout, layer)
    experts = model.experts if model.is_sparse(layer) else None
    parts = (_te_parts if transformer_engine else _local_parts)(model, w, b)
    swiglu = 3 if fused_swiglu else 5
    parts["mlp"] = b * swiglu * w.ffn
    if experts:  # a copy of the token per expert, before and after the MLP, and the router's scores
        copies = experts.per_token
        parts["mlp"] += b * 2 * copies * w.shared + 3 * FP32 * experts.count
    everything = sum(parts.values())
    dropped = _dropped(parts, recompute, everything)
    kept = b * w.shared if recompute.granularity == "full" else everything - dropped
    return Layer(
        kept=kept,
        recomputed=dropped,
        backward=b * (2 * w.ffn + w.hidden),
        forward=b * (swiglu * w.ffn + 4 * w.shared),
    )


def _local_parts(model: Architecture, w: Widths, b: int) -> dict[str, float]:
    """Megatron's local layers: norms work in fp32 and keep their input and the output before the weight."""
    norm = 2 * FP32 * w.shared + FP32
    keys = w.query + 2 * w.key if b == FP32 else w.key  # in fp32 a view, which keeps all of queries, keys and values
    qk_norm = FP32 * (2 * w.query + w.heads + keys + w.key + w.key_heads) if model.qk_norm else 0
    return {
        "layernorm": 2 * norm,
        "projections": b * (2 * w.shared + w.query),
        "qk_norm": qk_norm,
        "rope": 4 * b * model.head_dim,
        "core_attn": b * (2 * w.query + 2 * w.key) + FP32 * w.heads + 17,
    }


def _te_parts(model: Architecture, w: Widths, b: int) -> dict[str, float]:
    """Transformer Engine: norms fused into the next product keep bf16; the projection keeps attention's output."""
    return {
        "layernorm": 2 * (b * w.shared + FP32),
        "projections": b * (2 * w.shared + w.query + 2 * w.key),
        "qk_norm": b * (w.query + w.key) + FP32 * (w.heads + w.key_heads) if model.qk_norm else 0,
        "rope": 4 * b * model.head_dim,
        "core_attn": b * (2 * w.query + 2 * w.key) + FP32 * w.heads,
    }


def _dropped(parts: dict[str, float], recompute: RecomputeSettings, everything: float) -> float:
    """Returns the bytes that recompute saves.

    The input of a recomputed part stays, and is counted where it was made. Modules of unknown savings count as kept.
    """
    if recompute.granularity == "full":
        return everything
    if recompute.granularity == "none":
        return 0.0
    part_of = {"core_attn": "core_attn", "mlp": "mlp", "moe": "mlp"}
    return sum(parts[part] for part in {part_of.get(module) for module in recompute.modules} if part)
