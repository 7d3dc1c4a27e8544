"""From rewards to advantages, relative to the responses of the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("grpo",)


def group_advantages(rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo", eps: float = 1e-6) -> Tensor:
    """[N] advantages. "grpo": (R - mean) / (std + eps) in the group, std with Bessel's correction (arXiv 2402.03300).

    Computed in fp64. A group whose rewards are all equal, and so a group of one, gets exactly 0.

    Args:
        rewards: [N]; every response of a group must be in the call.
        group_ids: [N] integers, equal for responses to the same prompt; any order.

    Returns:
        [N] in the dtype of `rewards`; fp32 for integer rewards.

    Raises:
        ValueError: an unknown estimator, shapes that differ, a reward that is not finite.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not known; known: {', '.join(ESTIMATORS)}")
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards and group_ids must both be [N], got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    if group_ids.is_floating_point():
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    exact = rewards.double()
    bad = (~exact.isfinite()).nonzero().squeeze(1)
    if bad.numel():
        raise ValueError(f"rewards[{int(bad[0])}] is {float(exact[bad[0]])}; rewards must be finite")

    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    zeros = exact.new_zeros(sizes.shape[0])
    mean = zeros.index_add(0, group, exact) / sizes
    centred = exact - mean[group]
    # Divides by 1 in a group of one, where the sum of squares is 0 anyway.
    std = (zeros.index_add(0, group, centred.square()) / (sizes - 1).clamp_min(1)).sqrt()
    # The mean of equal rewards may be off by a rounding error, which a tiny eps would blow up.
    lowest = zeros.scatter_reduce(0, group, exact, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, exact, "amax", include_self=False)
    advantages = torch.where((lowest == highest)[group], 0.0, centred / (std[group] + eps))
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)
