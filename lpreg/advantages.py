"""From rewards to advantages, relative to the responses of the same prompt or of the same batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpreg._torch import torch

if TYPE_CHECKING:
    from torch import Tensor

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus")


def group_advantages(rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo", eps: float = 1e-6) -> Tensor:
    """[N] advantages, computed in fp64.

    - "grpo": (R - mean) / (std + eps) in the group, std with Bessel's correction (arXiv 2402.03300);
    - "dr_grpo": R - mean in the group (arXiv 2503.20783);
    - "rloo": R - mean of the group's others (arXiv 2402.14740);
    - "reinforce_plus_plus": (R - mean) / (std + eps) over the whole call, groups disregarded (arXiv 2501.03262).

    Where all rewards that are compared are equal, and so in a group of one, the advantage is exactly 0.

    Args:
        rewards: [N]; every response of a group must be in the call, and of the batch for "reinforce_plus_plus".
        group_ids: [N] integers, equal for responses to the same prompt; any order.
        eps: read by the estimators that divide by a standard deviation.

    Returns:
        [N] in the dtype of `rewards`; fp32 for integer rewards.

    Raises:
        ValueError: an unknown estimator, shapes that differ, a reward that is not finite.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not known; known: {', '.join(ESTIMATORS)}")
    exact = checked_rewards(rewards, group_ids)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")

    compared = torch.zeros_like(group_ids) if estimator == "reinforce_plus_plus" else group_ids
    _, group, sizes = compared.unique(return_inverse=True, return_counts=True)
    zeros = exact.new_zeros(sizes.shape[0])
    mean = zeros.index_add(0, group, exact) / sizes
    centred = exact - mean[group]
    others = (sizes - 1).clamp_min(1)  # in a group of one, where what is divided is 0 anyway, by 1
    if estimator == "dr_grpo":
        values = centred
    elif estimator == "rloo":
        values = centred * (sizes / others)[group]
    else:
        std = (zeros.index_add(0, group, centred.square()) / others).sqrt()
        values = centred / (std[group] + eps)
    # The mean of equal rewards may be off by a rounding error, which a tiny eps would blow up.
    advantages = torch.where(all_equal(exact, group, sizes.shape[0])[group], 0.0, values)
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def checked_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """`rewards` [N] in fp64. Raises ValueError on shapes that differ and on a reward that is not finite."""
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
    """[G] bool, the groups whose rewards are all the same. rewards: [N]; group: [N], in [0, G)."""
    zeros = rewards.new_zeros(groups)
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    return lowest == zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
