"""Bytes of activations, for each token of a micro-batch on one rank.

What a layer keeps for its backward is listed tensor by tensor, as autograd was seen to save them for Megatron's local
layers (CPU; `tests/unit/plan` measures them); for Transformer Engine's the list follows its source, and no GPU has
confirmed it yet. Legend: b bytes an element, h hidden, f feed-forward, q and k widths of queries and of keys, t tensor-
parallel ranks, s those that share the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.actor import RecomputeSettings
from megatron_rl.models.architecture import Architecture
from megatron_rl.parallel.layout import Layout

FP32 = 4


@dataclass(frozen=True, slots=True)
class Widths:
    """Of one rank's part of a layer, in elements a token."""

    hidden: float
    """Where the sequence is whole."""
    shared: float
    """Where sequence parallelism shares it out."""
    query: float
    key: float
    heads: float
    key_heads: float
    ffn: float
    """Of the dense MLP, or of all experts that a token meets."""

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
    """Bytes a token."""

    kept: float
    """From its forward to its backward."""
    again: float
    """What recompute brings back, of one layer at a time."""
    backward: float
    """Gradients within its backward, beyond what that has freed."""
    forward: float
    """The most within a forward that keeps nothing."""


def layer_bytes(
    model: Architecture, layout: Layout, layer: int, *, b: int, recompute: RecomputeSettings, transformer_engine: bool
) -> Layer:
    """Of a layer on one rank."""
    w = Widths.of(model, layout, layer)
    experts = model.experts if model.is_sparse(layer) else None
    parts = (_te_parts if transformer_engine else _local_parts)(model, w, b)
    if experts:  # every token once for each of its experts, before and after, and the router's scores
        copies = experts.per_token
        parts["mlp"] += b * 2 * copies * w.shared + 3 * FP32 * experts.count
    everything = sum(parts.values())
    dropped = _dropped(parts, recompute, everything)
    kept = b * w.shared if recompute.granularity == "full" else everything - dropped
    return Layer(
        kept=kept,
        again=dropped,
        backward=b * (2 * w.ffn + w.hidden),
        forward=b * (5 * w.ffn + 4 * w.shared),
    )


def _local_parts(model: Architecture, w: Widths, b: int) -> dict[str, float]:
    """Norms work in fp32 and keep what went in and what came out before the weight."""
    norm = 2 * FP32 * w.shared + FP32
    keys = w.query + 2 * w.key if b == FP32 else w.key  # in fp32 a view: it keeps the whole of queries, keys and values
    qk_norm = FP32 * (2 * w.query + w.heads + keys + w.key + w.key_heads) if model.qk_norm else 0
    return {
        "layernorm": 2 * norm,
        "projections": b * (2 * w.shared + w.query),
        "qk_norm": qk_norm,
        "rope": 4 * b * model.head_dim,
        "core_attn": b * (2 * w.query + 2 * w.key) + FP32 * w.heads + 17,
        "mlp": b * 5 * w.ffn,
    }


def _te_parts(model: Architecture, w: Widths, b: int) -> dict[str, float]:
    """Norms fused into the products that follow keep bf16; flash attention's output is what the projection keeps."""
    return {
        "layernorm": 2 * (b * w.shared + FP32),
        "projections": b * (2 * w.shared + w.query + 2 * w.key),
        "qk_norm": b * (w.query + w.key) + FP32 * (w.heads + w.key_heads) if model.qk_norm else 0,
        "rope": 4 * b * model.head_dim,
        "core_attn": b * (2 * w.query + 2 * w.key) + FP32 * w.heads,
        "mlp": b * 5 * w.ffn,
    }


def _dropped(parts: dict[str, float], recompute: RecomputeSettings, everything: float) -> float:
    """What the backward computes again. What goes into a dropped part stays, and is counted where it was made; modules
    whose saving is not known here count as kept."""
    if recompute.granularity == "full":
        return everything
    if recompute.granularity == "none":
        return 0.0
    part_of = {"core_attn": "core_attn", "mlp": "mlp", "moe": "mlp"}
    return sum(parts[part] for part in {part_of.get(module) for module in recompute.modules} if part)
