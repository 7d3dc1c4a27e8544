"""The check of labels before a run: whether the verifier can use them at all."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_rl.config.reward import RewardSettings
from megatron_rl.types import Prompt
from megatron_rl.utils.import_path import import_callable

READERS = {
    "countdown": "megatron_rl.reward.countdown:read_label",
    "math": "megatron_rl.reward.maths.verifier:read_label",
    "code": "megatron_rl.reward.code.cases:read_cases",
    "reasoning-gym": "megatron_rl.environments.reasoning_gym:read_label",
}
"""Name of a built-in verifier -> the function with which the verifier reads a label. The function raises ValueError."""


def label_check(settings: RewardSettings) -> Callable[[Prompt], None] | None:
    """Returns a function that raises ValueError for a prompt whose label the configured verifier cannot use.

    None for a reward server and a reward of the user's own, whose labels may be anything.
    """
    if settings.name not in READERS:
        return None
    read = import_callable(READERS[settings.name], "reward.name")

    def check(prompt: Prompt) -> None:
        if isinstance(prompt.label, float) and not math.isfinite(prompt.label):
            raise ValueError(f"the label is {prompt.label}, which is no number that an answer could equal")
        try:
            read(prompt.label)
        except ValueError as error:
            raise ValueError(f"reward.name: {settings.name} cannot use the label: {error}") from error

    return check
