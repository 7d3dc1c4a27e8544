"""The learning rate of each step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    min_ratio: float = 0.0,
) -> float:
    """Returns the learning rate of a step, counted from 1.

    After linear warm-up the schedule applies. `linear` and `cosine` end at `min_ratio` of the peak; `constant` stays at
    the peak.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - (1 - min_ratio) * done)
    if schedule == "cosine":
        return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))
    return peak
