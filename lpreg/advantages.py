"""Advantages from rewards, relative to the responses to the same prompt or of the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lpreg._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "maxrl", "reinforce_plus_plus")

Estimator = Callable[["Tensor", "Tensor"], "Tensor"]
"""(rewards [N] fp64, group_ids [N]) -> advantages [N]."""


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, estimator: str | Estimator = "grpo", eps: float = 1e-6
) -> Tensor:
    """Returns the advantages [N], computed in fp64.

    - "grpo": (R - mean) / (std + eps) in the group, std with Bessel's correction (arXiv 2402.03300);
    - "dr_grpo": R - mean in the group (arXiv 2503.20783);
    - "rloo": R - mean of the group's others (arXiv 2402.14740);
    - "maxrl": (R - mean) / mean in the group, the truncated gradient of the log-likelihood of success (arXiv
      2602.02710); for rewards that are not negative;
    - "reinforce_plus_plus": (R - mean) / (std + eps) over the whole call, without regard to groups (arXiv 2501.03262).

    If all rewards that are compared are equal, and so in a group of one, the advantage is exactly 0. An estimator of
    your own is a function, and its advantages are returned as they are.

    Args:
        rewards: [N]; every response of a group must be in the call, and of the batch for "reinforce_plus_plus".
        group_ids: [N] integers, equal for responses to the same prompt; in any order.
        eps: read by the estimators that divide by a standard deviation.

    Returns:
        [N] in the dtype of `rewards`; fp32 for integer rewards.

    Raises:
        ValueError: an unknown estimator, shapes that differ, a reward or an advantage that is not finite, a negative
            reward with "maxrl".
    """
    if not callable(estimator) and estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not known; known: {', '.join(ESTIMATORS)}")
    exact = checked_rewards(rewards, group_ids)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    if callable(estimator):
        return _checked_advantages(estimator(exact, group_ids), exact).to(dtype)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")

    compared = torch.zeros_like(group_ids) if estimator == "reinforce_plus_plus" else group_ids
    _, group, sizes = compared.unique(return_inverse=True, return_counts=True)
    zeros = exact.new_zeros(sizes.shape[0])
    mean = zeros.index_add(0, group, exact) / sizes
    centred = exact - mean[group]
    others = (sizes - 1).clamp_min(1)  # a group of one divides 0 by 1
    if estimator == "dr_grpo":
        values = centred
    elif estimator == "rloo":
        values = centred * (sizes / others)[group]
    elif estimator == "maxrl":
        _check_not_negative(exact)
        values = centred / torch.where(mean > 0, mean, 1.0)[group]
    else:
        std = (zeros.index_add(0, group, centred.square()) / others).sqrt()
        values = centred / (std[group] + eps)
    # The mean of equal rewards may have a rounding error, which a tiny eps would amplify.
    advantages = torch.where(all_equal(exact, group, sizes.shape[0])[group], 0.0, values)
    return advantages.to(dtype)


def _check_not_negative(rewards: Tensor) -> None:
    negative = (rewards < 0).nonzero().squeeze(1)
    if negative.numel():
        raise ValueError(
            f"rewards[{int(negative[0])}] is {float(rewards[negative[0]])}, but maxrl takes no negative rewards: it "
            "divides by the mean of a group"
        )


def _checked_advantages(advantages: Any, rewards: Tensor) -> Tensor:
    """Returns what an estimator of the user's own returned, if it is one finite number per response."""
    if not isinstance(advantages, torch.Tensor) or advantages.shape != rewards.shape:
        got = list(advantages.shape) if isinstance(advantages, torch.Tensor) else type(advantages).__name__
        raise ValueError(
            f"the estimator must return a tensor of shape {list(rewards.shape)}, one advantage per reward, not {got}"
        )
    bad = (~advantages.isfinite()).nonzero().squeeze(1)
    if bad.numel():
        raise ValueError(f"advantages[{int(bad[0])}] is {float(advantages[bad[0]])}; advantages must be finite")
    return advantages


def checked_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Returns `rewards` [N] in fp64. Raises ValueError for shapes that differ and for a reward that is not finite."""
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards and group_ids must both be [N], got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    if group_ids.is_floating_point():
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}")
    exact = rewards.double()
    bad = (~exact.isfinite()).nonzero().squeeze(1)
    if bad.numel():
        raise ValueError(f"rewards[{int(bad[0])}] is {float(exact[bad[0]])}; rewards must be finite")
    return exact


def all_equal(rewards: Tensor, group: Tensor, groups: int) -> Tensor:
    """Returns [G] bool, the groups whose rewards are all the same. rewards: [N]; group: [N], in [0, G)."""
    zeros = rewards.new_zeros(groups)
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    return lowest == zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
