"""Importance correction between the engine that sampled and the actor that trains, which never agree to the last bit.

With w = p_actor / p_rollout of the sampled token, both of the policy that generated the batch, weights multiply the
advantages: a weight is never negative, so the sign of an advantage does not change. A method's own term (Lp-Reg's KL,
an entropy bonus) is not weighted, but Lp-Reg does not regularise a token whose weighted advantage is 0.

Legend: T tokens. Functions that take sequence_ids need complete responses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpreg._torch import torch
from lpreg.aggregation import mean_of_sequence

if TYPE_CHECKING:
    from torch import Tensor


def truncated_weights(actor_log_probs: Tensor, rollout_log_probs: Tensor, *, high: float = 2.0) -> Tensor:
    """Returns min(w, high) [T], detached: truncated importance sampling, TIS (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). high: above 0.

    Raises:
        ValueError: shapes that differ, a NaN, a bound out of range.
    """
    _check_bounds(0.0, high)
    return _log_weights(actor_log_probs, rollout_log_probs).exp().clamp(max=high)


def masked_weights(
    actor_log_probs: Tensor, rollout_log_probs: Tensor, *, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Returns w [T] where low <= w <= high, otherwise 0, detached: masked importance sampling, MIS (IcePop, arXiv
    2510.18855). A token with weight 0 still counts in a token-mean.

    Raises:
        ValueError: shapes that differ, a NaN, bounds out of order.
    """
    _check_bounds(low, high)
    weights = _log_weights(actor_log_probs, rollout_log_probs).exp()
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def accepted_sequences(
    actor_log_probs: Tensor,
    rollout_log_probs: Tensor,
    sequence_ids: Tensor,
    *,
    low: float = 0.99,
    high: float = 1.01,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns [T] bool, tokens of responses whose geometric mean of w lies in [low, high]; reject the other responses.

    Multiply the advantages by the result, or combine it with LossInputs.mask.

    Args:
        sequence_ids: [T] integers, the response that each token belongs to.
        mask: [T] bool, tokens that count. None: all.

    Raises:
        ValueError: shapes that differ, a NaN, bounds out of order.
    """
    _check_bounds(low, high)
    log_weights = _log_weights(actor_log_probs, rollout_log_probs)
    counted = torch.ones_like(log_weights, dtype=torch.bool) if mask is None else mask
    for name, value in (("sequence_ids", sequence_ids), ("mask", counted)):
        if value.shape != log_weights.shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, but the log-probs {list(log_weights.shape)}")
    mean = mean_of_sequence(log_weights, counted, sequence_ids).exp()
    return (mean >= low) & (mean <= high)


def _log_weights(actor_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    if actor_log_probs.shape != rollout_log_probs.shape:
        raise ValueError(
            f"rollout_log_probs has shape {list(rollout_log_probs.shape)}, "
            f"but actor_log_probs has {list(actor_log_probs.shape)}"
        )
    log_weights = (actor_log_probs - rollout_log_probs).detach()
    if log_weights.isnan().any():
        token = int(log_weights.isnan().flatten().nonzero()[0])
        raise ValueError(f"actor_log_probs - rollout_log_probs is NaN, first at token {token}")
    return log_weights


def _check_bounds(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ValueError(f"the bounds must satisfy 0 <= low < high, got low={low} and high={high}")
