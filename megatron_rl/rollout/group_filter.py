"""Filters of groups: which graded groups a step trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.collector import GroupFilter
from megatron_rl.utils.import_path import own_function

if TYPE_CHECKING:
    from megatron_rl.config.rollout import RolloutSettings


def has_signal(group: Group) -> bool:
    """Dynamic sampling (DAPO): keeps groups whose scores differ."""
    return group.has_signal


def group_filter_of(settings: RolloutSettings) -> GroupFilter | None:
    """Returns the configured filter, or None if every group is kept. Raises UserError if it cannot be imported."""
    if settings.group_filter:
        return own_function(settings.group_filter, "rollout.group_filter")
    return has_signal if settings.dynamic_sampling else None
