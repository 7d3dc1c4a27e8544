"""Floating-point operations of a forward pass: two per weight and token, and those of causal attention."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.models.architecture import Architecture


def layer_weights(model: Architecture, layer: int) -> int:
    """Returns the number of matrix weights in a layer that one token is multiplied with."""
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    if model.experts is not None and model.is_sparse(layer):
        return attention + model.hidden * (model.experts.count + 3 * model.experts.per_token * model.experts.ffn)
    return attention + 3 * model.hidden * model.ffn


def body_flops(model: Architecture, tokens: float, squares: float) -> float:
    """Operations of a forward pass through all layers. squares: sum of the squared sequence lengths."""
    matrices = 2 * tokens * sum(layer_weights(model, layer) for layer in range(model.layers))
    attention = 2 * squares * model.layers * model.heads * model.head_dim  # half of 2 products, 2 operations each
    return matrices + attention


def pass_flops(model: Architecture, lengths: Sequence[int], response_tokens: float) -> float:
    """Operations of a forward pass over sequences of these lengths.

    The last token of a sequence is only a target, so the model does not run on it.
    """
    positions = [length - 1 for length in lengths]
    squares = sum(count * count for count in positions)
    return body_flops(model, sum(positions), squares) + head_flops(model, response_tokens)


def head_flops(model: Architecture, tokens: float) -> float:
    """Operations of a forward pass through the LM head, on the tokens that carry loss."""
    return 2 * tokens * model.hidden * model.vocabulary
