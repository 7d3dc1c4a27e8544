"""Lookup of the verifier that the configuration names."""

from __future__ import annotations

from typing import Any

from megatron_rl.config.reward import VERIFIERS, RewardSettings
from megatron_rl.types import Reward
from megatron_rl.utils.import_path import import_callable

TAKES_SETTINGS = ("math", "code")
"""Names of verifiers that are classes and are constructed from the settings."""


def load_reward(settings: RewardSettings) -> Reward:
    """Returns the verifier `settings.name`: a built-in one, or `package.module:function`.

    Modules are found on sys.path or in the working folder. Raises UserError for a module that cannot be imported, or an
    object that cannot be called.
    """
    loaded: Any = import_callable(VERIFIERS.get(settings.name, settings.name), "reward.name")
    return loaded(settings) if settings.name in TAKES_SETTINGS else loaded
