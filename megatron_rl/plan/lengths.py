"""How long responses are: log-normal, cut off at the limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

QUANTILES = 200


@dataclass(frozen=True, slots=True)
class Lengths:
    """Equally likely response lengths, ascending."""

    values: tuple[float, ...]

    def mean(self, of: Callable[[float], float] = lambda length: length) -> float:
        return sum(of(length) for length in self.values) / len(self.values)

    def longer(self, than: float) -> float:
        """Share of responses that are longer."""
        return sum(length > than for length in self.values) / len(self.values)

    @property
    def cut(self) -> float:
        """Share of responses that reach the limit."""
        return sum(length >= self.values[-1] for length in self.values) / len(self.values)


@cache
def lengths(mean: float, spread: float, limit: float) -> Lengths:
    """With that mean after the cut; the mean must be below the limit."""
    normal = [NormalDist().inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]
    low, high = math.log(mean) - 3 * spread, math.log(limit) + 3 * spread
    for _ in range(60):  # the mean rises with the middle
        middle = (low + high) / 2
        values = tuple(min(limit, math.exp(middle + spread * z)) for z in normal)
        low, high = (middle, high) if sum(values) / QUANTILES < mean else (low, middle)
    return Lengths(values)
