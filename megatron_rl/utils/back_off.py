"""Growing pauses between the attempts at something that fails."""

from __future__ import annotations

import random


def back_off_seconds(failures: int, *, first: float, longest: float, jitter: bool = True) -> float:
    """Seconds to wait after so many failures in a row: `first`, then twice as long each time, at most `longest`.

    jitter: multiplies the pause by a random number between 0.5 and 1.5, so that many callers do not retry together.
    """
    pause = min(first * 2 ** (failures - 1), longest)
    return min(pause * random.uniform(0.5, 1.5), longest) if jitter else pause
