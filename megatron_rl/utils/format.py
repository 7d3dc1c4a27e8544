"""Numbers, durations and sparklines as short text, shared by the terminal, the summary and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"


def number(value: float | None) -> str:
    """Formats a number with three or four digits: `0.412`, `23.1`, `12345`, `3.1e-05`; `-` for a missing value."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.001 or value == 0:
        return f"{value:.3f}"
    return f"{value:.1e}"


def counted(count: int, noun: str) -> str:
    """Formats a number of things: `1 node`, `2 nodes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float | None) -> str:
    """Formats a duration: `9 s`, `3 min 05 s`, `2 h 07 min`; `-` if it is unknown."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Draws the values as at most `width` blocks; each block is the mean of an equal share of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    columns = min(width, len(finite))
    edges = [round(i * len(finite) / columns) for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    # Differences that come from rounding alone are drawn as a flat line.
    flat = high - low <= 1e-6 * max(abs(high), abs(low))
    scale = 0.0 if flat else (len(blocks) - 1) / (high - low)
    return "".join(blocks[round((mean - low) * scale)] for mean in means)
