"""Methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from lpreg.losses.base import PolicyLoss
from lpreg.losses.cispo import CISPO
from lpreg.losses.clip_cov import ClipCov
from lpreg.losses.clip_higher import ClipHigher
from lpreg.losses.dual_clip import DualClip
from lpreg.losses.entropy_bonus import EntropyBonus
from lpreg.losses.grpo import GRPO
from lpreg.losses.gspo import GSPO
from lpreg.losses.high_entropy import HighEntropy
from lpreg.losses.kl_cov import KLCov
from lpreg.losses.lp_reg import LpReg
from lpreg.presets import PRESETS

_CLASSES: tuple[type[PolicyLoss], ...] = (
    GRPO,
    LpReg,
    ClipHigher,
    DualClip,
    GSPO,
    CISPO,
    KLCov,
    ClipCov,
    HighEntropy,
    EntropyBonus,
)
METHODS = {method.name: method for method in _CLASSES}


class _LossFactory:
    """`make_loss(name, **settings)` and `make_loss.preset(name, preset, **overrides)`."""

    def __call__(self, name: str, **settings: Any) -> PolicyLoss:
        """The method `name`; settings not given take the defaults of its Settings dataclass.

        Raises:
            ValueError: an unknown method or setting (the message names the nearest known one), or a value out of range.
        """
        if name not in METHODS:
            raise ValueError(_unknown("method", name, METHODS))
        method = METHODS[name]
        known = [field.name for field in fields(method.Settings)]
        for setting in settings:
            if setting not in known:
                raise ValueError(_unknown(f"setting of {name}", setting, known))
        return method(method.Settings(**settings))

    def preset(self, name: str, preset: str, **overrides: Any) -> PolicyLoss:
        """The method `name` with the settings of "paper" or "reference" (see `lpreg.presets`), some overridden."""
        if name not in METHODS:
            raise ValueError(_unknown("method", name, METHODS))
        if preset not in PRESETS[name]:
            raise ValueError(_unknown(f"preset of {name}", preset, PRESETS[name]))
        return self(name, **PRESETS[name][preset] | overrides)


make_loss = _LossFactory()


def _unknown(what: str, given: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{given!r} is not a {what}; {hint}known: {', '.join(known)}"
