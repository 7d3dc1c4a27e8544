"""Lookup of the verifier that the configuration names."""

from __future__ import annotations

import difflib
from typing import Any

from megatron_rl.config.reward import RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.types import Reward
from megatron_rl.utils.import_path import import_object, is_import_path

BUILT_IN = {
    "countdown": "megatron_rl.reward.countdown:verify_countdown",
    "math": "megatron_rl.reward.maths:MathsReward",
    "code": "megatron_rl.reward.code:CodeReward",
}
TAKES_SETTINGS = ("math", "code")
"""Names of verifiers that are classes and are constructed from the settings."""


def load_reward(settings: RewardSettings) -> Reward:
    """Returns the verifier `settings.name`: a built-in one, or `package.module:function`.

    Modules are found on sys.path or in the working folder. Raises UserError for an unknown name, a module that cannot
    be imported, or an object that cannot be called.
    """
    loaded = _find(settings.name)
    return loaded(settings) if settings.name in TAKES_SETTINGS else loaded


def _find(name: str) -> Any:
    path = BUILT_IN.get(name, name)
    if not is_import_path(path):
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        known = ", ".join(map(repr, BUILT_IN))
        raise UserError(f"reward.name: unknown reward {name!r}.{hint} Known: {known}, or 'package.module:function'.")
    reward = import_object(path, "reward.name")
    if not callable(reward):
        attribute = path.rpartition(":")[2]
        raise UserError(
            f"reward.name={name!r}: {attribute!r} is a {type(reward).__name__}, not a function of a sample."
        )
    return reward
