"""Exact reading of plain numbers. Most labels are plain numbers, which need no computer algebra system."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)
"""Tolerance for decimals: one unit of the sixth decimal, or of the sixth significant digit below 0.1."""
SHORT = 5
"""Most decimals of a decimal label that is taken as exact."""
_LARGEST_EXPONENT = 400
_SIGN = r"(?P<sign>[+-]?)"
_DECIMAL = r"(?:\d+\.?\d*|\.\d+)"
_FORMS = [
    re.compile(_SIGN + pattern)
    for pattern in (
        rf"(?P<decimal>{_DECIMAL})",
        r"\\frac\{(?P<over>[+-]?\d+\.?)\}\{(?P<under>[+-]?\d+\.?)\}",
        r"(?P<over>\d+\.?)/(?P<under>\d+\.?)",
        r"(?P<whole>\d+) ?\\frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}",
        r"(?P<whole>\d+) (?P<over>\d+)/(?P<under>\d+)",
        rf"(?P<decimal>{_DECIMAL})[eE](?P<exponent>[+-]?\d+)",
        r"(?P<decimal>10)\^\{(?P<power>[+-]?\d+)\}",
        rf"(?P<decimal>{_DECIMAL}) ?(?:\\times|\\cdot|\*) ?10\^\{{(?P<exponent>[+-]?\d+)\}}",
        r"(?P<decimal>\d*\.\d*)\\overline\{(?P<period>\d+)\}",
    )
]


@dataclass(frozen=True)
class Number:
    """A number and its notation."""

    value: Fraction
    is_decimal: bool
    """Whether the number was written with a decimal point and may therefore be rounded."""
    is_fraction: bool = field(default=False, compare=False)
    """Whether the number was written as a fraction, which may be a ratio."""


def read_number(text: str) -> Number | None:
    """Reads an integer, decimal, fraction, mixed number or power of ten. Returns None for anything else."""
    for form in _FORMS:
        if match := form.fullmatch(text):
            parts = match.groupdict()
            number = _recurring(parts) if parts.get("period") else _plain(parts)
            return replace(number, value=-number.value) if number and parts["sign"] == "-" else number
    return None


def same_number(gold: Number, answer: Number) -> bool:
    """Returns whether the numbers are equal, or one is a decimal that equals the other within `TOLERANCE`.

    A label that is an integer or a decimal of few digits is not rounded, so it has no tolerance.
    """
    if gold.value == answer.value:
        return True
    return not _is_short(gold) and (gold.is_decimal or answer.is_decimal) and close(gold.value, answer.value)


def close(a: Fraction, b: Fraction) -> bool:
    """Returns whether the values agree within `TOLERANCE`."""
    unit, larger = TOLERANCE, max(abs(a), abs(b))
    while unit and larger and larger * 10 < 1:
        unit, larger = unit / 10, larger * 10
    return abs(a - b) <= unit


def _is_short(number: Number) -> bool:
    if not number.is_decimal:
        return number.value.denominator == 1
    return (number.value * 10**SHORT).denominator == 1


def _plain(parts: dict[str, str | None]) -> Number | None:
    decimal, under = parts.get("decimal"), parts.get("under")
    if decimal is not None:
        power, exponent = parts.get("power"), int(parts.get("exponent") or 0)
        exponent = exponent if power is None else int(power) - 1
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        return Number(Fraction(decimal) * Fraction(10) ** exponent, "." in decimal)
    if not under or Fraction(under.rstrip(".")) == 0:
        return None
    over = Fraction(str(parts["over"]).rstrip("."))
    whole = parts.get("whole")
    return Number(int(whole or 0) + over / Fraction(under.rstrip(".")), False, is_fraction=not whole)


def _recurring(parts: dict[str, str | None]) -> Number:
    whole, _, tail = str(parts["decimal"]).partition(".")
    period = str(parts["period"])
    unit = Fraction(1, 10 ** len(tail))
    return Number(
        Fraction(int((whole + tail) or "0")) * unit + unit * Fraction(int(period), 10 ** len(period) - 1), False
    )
