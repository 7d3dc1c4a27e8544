"""DAPO's changes to rewards before advantages: a penalty on length, and groups without a signal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpreg.advantages import all_equal, checked_rewards

if TYPE_CHECKING:
    from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """Returns [N] fp32 in [-1, 0], to be added to the rewards: DAPO's soft overlong punishment (arXiv 2503.14476).

    The penalty is 0 up to max_length - buffer tokens, falls linearly to -1 at max_length, and is -1 beyond it.

    Args:
        lengths: [N] integers, number of tokens of each response.
        max_length: number of tokens of the longest response allowed.
        buffer: number of last tokens over which the penalty grows; in [1, max_length].

    Raises:
        ValueError: lengths that are not counts, a buffer out of range.
    """
    if lengths.is_floating_point() or bool((lengths < 0).any()):
        raise ValueError(f"lengths must be integers of 0 or more, got {lengths.dtype}")
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must lie in [1, max_length = {max_length}], got {buffer}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def uninformative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Returns [N] bool, responses of groups whose rewards are all equal: dynamic sampling draws other prompts for them.

    Such a group has no advantage (arXiv 2503.14476). The caller samples until enough groups have a signal.

    Args:
        rewards: [N], as the verifier gave them, before any penalty; every response of a group must be in the call.
        group_ids: [N] integers, equal for responses to the same prompt; in any order.

    Raises:
        ValueError: shapes that differ, a reward that is not finite.
    """
    exact = checked_rewards(rewards, group_ids)
    ids, group = group_ids.unique(return_inverse=True)
    return all_equal(exact, group, ids.numel())[group]
