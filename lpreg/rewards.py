"""What DAPO does to rewards before there are advantages: shape them by length, and drop groups that teach nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpreg.advantages import all_equal, checked_rewards

if TYPE_CHECKING:
    from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """[N] fp32 in [-1, 0], to be added to the rewards: DAPO's soft overlong punishment (arXiv 2503.14476).

    0 up to max_length - buffer tokens, then falling in a straight line to -1 at max_length, -1 beyond it.

    Args:
        lengths: [N] integers, tokens of each response.
        max_length: the longest response allowed, tokens.
        buffer: the last tokens of it, over which the penalty grows; in [1, max_length].

    Raises:
        ValueError: lengths that are no counts, a buffer that does not fit.
    """
    if lengths.is_floating_point() or bool((lengths < 0).any()):
        raise ValueError(f"lengths must be integers of 0 or more, got {lengths.dtype}")
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer must lie in [1, max_length = {max_length}], got {buffer}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def uninformative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[N] bool, responses of groups whose rewards are all equal: dynamic sampling draws other prompts for them.

    Such a group has no advantage (arXiv 2503.14476). Sampling until enough groups are informative is the caller's.

    Args:
        rewards: [N], as the verifier gave them, before any penalty; every response of a group must be in the call.
        group_ids: [N] integers, equal for responses to the same prompt; any order.

    Raises:
        ValueError: shapes that differ, a reward that is not finite.
    """
    exact = checked_rewards(rewards, group_ids)
    ids, group = group_ids.unique(return_inverse=True)
    return all_equal(exact, group, ids.numel())[group]
