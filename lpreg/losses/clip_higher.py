"""Clip-Higher: GRPO with more room upwards than downwards (DAPO, arXiv 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from lpreg.losses.grpo import GRPO, GRPOSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipHigherSettings(GRPOSettings):
    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high where the advantage is positive."""


class ClipHigher(GRPO):
    """GRPO's loss with its own bounds. Inert on-policy: the ratio is 1 and nothing is clipped."""

    name = "clip_higher"
    Settings = ClipHigherSettings
    settings: ClipHigherSettings
