"""Means, intervals and tests over the seeds and warm starts of two arms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Student's t of a 95 % interval, by degrees of freedom from 1 to 20."""


def t95(freedom: int) -> float:
    """Returns Student's t of a 95 % interval. Above 20 degrees of freedom, Fisher's expansion is right to three digits:
    z + (z^3 + z) / 4n + (5 z^5 + 16 z^3 + 3 z) / 96 n^2."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, which has no bounds (NaN) with a single value."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of some values, with the interval of Student's t."""
        count, value = len(values), float(np.mean(values))
        if count < 2:
            return cls(value, math.nan, math.nan, count)
        half = t95(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(value, value - half, value + half, count)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p of paired differences, by all 2^n choices of their signs (Fisher's exact test). The
    smallest possible p is 2^(1 - n)."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = np.abs(signs @ np.array(differences))
    return float((sums >= abs(sum(differences)) - 1e-12).mean())
