"""Floating-point operations of a forward pass: two for each weight a token meets, and those of causal attention."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.models.architecture import Architecture


def layer_weights(model: Architecture, layer: int) -> int:
    """Weights of matrices that one token meets in a layer."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    if model.experts is not None and model.is_sparse(layer):
        return attention + model.hidden * (model.experts.count + 3 * model.experts.per_token * model.experts.ffn)
    return attention + 3 * model.hidden * model.ffn


def body_flops(model: Architecture, tokens: float, squares: float) -> float:
    """Forward through all layers. squares: the sum of the squared lengths of the rows."""
    matrices = 2 * tokens * sum(layer_weights(model, layer) for layer in range(model.layers))
    attention = 2 * squares * model.layers * model.heads * model.head_dim  # half of 2 products, 2 operations each
    return matrices + attention


def pass_flops(model: Architecture, lengths: Sequence[int], response_tokens: float) -> float:
    """Forward over rows of these lengths. A row's last token is only a target: nothing runs on it."""
    positions = [length - 1 for length in lengths]
    squares = sum(count * count for count in positions)
    return body_flops(model, sum(positions), squares) + head_flops(model, response_tokens)


def head_flops(model: Architecture, tokens: float) -> float:
    """Forward through the LM head, on the tokens that carry loss."""
    return 2 * tokens * model.hidden * model.vocabulary
