"""Lookup of the verifier that the configuration names."""

from __future__ import annotations

from typing import Any

from megatron_rl.config.reward import VERIFIERS, RewardSettings
from megatron_rl.reward.signature import check_signature
from megatron_rl.types import Reward
from megatron_rl.utils.import_path import import_callable

TAKES_SETTINGS = ("math", "code", "reasoning-gym")
"""Names of verifiers that are classes and are constructed from the settings."""


def load_reward(settings: RewardSettings) -> Reward:
    """Returns the verifier `settings.name`: a built-in one, or `package.module:function`.

    Modules are found on sys.path or in the working folder. Raises UserError for a module that cannot be imported, or an
    object that cannot be called with one sample.
    """
    loaded: Any = import_callable(VERIFIERS.get(settings.name, settings.name), "reward.name")
    if settings.name not in VERIFIERS:
        check_signature(loaded, settings.name)
    return loaded(settings) if settings.name in TAKES_SETTINGS else loaded
