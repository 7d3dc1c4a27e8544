"""Clip-Higher: GRPO with more room upwards than downwards (DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lpreg.losses.grpo import GRPO, GRPOSettings
from lpreg.losses.settings import NonNegative, same_presets


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipHigherSettings(GRPOSettings):
    """GRPO's settings with another upper bound."""

    clip_high: NonNegative = 0.28
    """The ratio counts up to 1 + clip_high if the advantage is positive."""


class ClipHigher(GRPO):
    """GRPO's loss with its own bounds. Inert on-policy: the ratio is 1 and nothing is clipped."""

    name = "clip_higher"
    Settings = ClipHigherSettings
    settings: ClipHigherSettings
    presets: ClassVar = same_presets(clip_low=0.2, clip_high=0.28)
