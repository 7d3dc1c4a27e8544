"""Notations of their own: clock times, numbers in another base, ratios."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_HALF = r"\s*(?:\\text\{\s*)?(?P<half>[ap])\.?\s*m\.?(?:\s*\})?"
_CLOCK = re.compile(
    rf"(?P<hours>\d{{1,2}})(?::(?P<minutes>\d{{2}})(?::(?P<seconds>\d{{2}}))?)?(?:{_HALF})?", re.IGNORECASE
)
_OCLOCK = re.compile(r"(\d{1,2})(?::00)? o ?' ?clock", re.IGNORECASE)
_WORDS = {"noon": (12, "p"), "12 noon": (12, "p"), "midnight": (12, "a"), "12 midnight": (12, "a")}
_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip
_DIGITS = r"[0-9A-Fa-f]*\d[0-9A-Fa-f]*|[A-Fa-f]+|[0-9A-Fa-f]*\.[0-9A-Fa-f]+|[0-9A-Fa-f]+\.[0-9A-Fa-f]*"
_BASED = re.compile(
    rf"(?P<sign>[+-]?)(?P<open>\(?)(?P<sign_within>[+-]?)(?:\\text\{{)?(?P<digits>{_DIGITS})\}}?(?P<close>\)?)"
    r"(?:_\{?\(?(?:\\text\{)?(?:base ?\}?)?(?P<base>\d{1,2}|[a-z]+)\}?\)?\}?"
    r"|\s*\\text\{\s*(?:\(?(?:in )?)?base ?\}?(?P<worded>\w+)\)?\s*\}?)"
)
_NEGATED = re.compile(r"-\(([^()]*_[^()]*)\)")
_RATIO_WORD = re.compile(r"\\text\{ ?to ?\}| to |(?<=\d)\\to(?=\d)")


@dataclass(frozen=True)
class Clock:
    """A time of day in seconds, with the half of the day if the answer names one."""

    seconds: int
    half: str | None
    numbers: tuple[int, ...]
    """The numbers as written, because `9:16` may also be a ratio."""

    def equals(self, other: Clock) -> bool:
        """Returns whether both name the same time. A half of the day may be missing on one side."""
        if self.half and other.half:
            return self._of_day() == other._of_day()
        if self.half or other.half:
            return self._of_day() == other._of_day() or self.seconds == other.seconds
        return self.seconds == other.seconds

    def _of_day(self) -> int:
        if self.half is None or self.seconds >= 13 * 3600:
            return self.seconds
        return self.seconds % (12 * 3600) + (12 * 3600 if self.half == "p" else 0)


@dataclass(frozen=True)
class Based:
    """Digits in the named base."""

    digits: str
    base: int


def read_clock(text: str) -> Clock | None:
    """Reads `4:30`, `16:30:05`, `9 a.m.` or noon. A number alone is no time."""
    plain = " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).lower().split())
    if plain in _WORDS:
        hours, half = _WORDS[plain]
        return Clock(hours * 3600, half, (hours,))
    if match := _OCLOCK.fullmatch(plain):
        text = f"{match[1]}:00"
    match = _CLOCK.fullmatch(text)
    if not match or not (match["minutes"] or match["half"]):
        return None
    hours, minutes, seconds = (int(match[name] or 0) for name in ("hours", "minutes", "seconds"))
    if hours > (12 if match["half"] and hours < 13 else 24) or minutes > 59 or seconds > 59:
        return None
    written = tuple(int(match[name]) for name in ("hours", "minutes", "seconds") if match[name])
    return Clock(hours * 3600 + minutes * 60 + seconds, match["half"].lower() if match["half"] else None, written)


def read_based(text: str) -> Based | None:
    r"""Reads `101_{2}`, `(-1A)_{16}` or `0.11_{\text{two}}`."""
    if negated := _NEGATED.fullmatch(text):
        inside = read_based(negated[1])
        return Based(f"-{inside.digits}", inside.base) if inside and not inside.digits.startswith("-") else None
    match = _BASED.fullmatch(text)
    if not match or bool(match["open"]) != bool(match["close"]):
        return None
    name = match["base"] or match["worded"]
    base = int(name) if name.isdigit() else _NAMES.get(name.lower(), 0)
    if not 2 <= base <= 36 or (match["digits"].isalpha() and not match["open"] and base <= 10):
        return None
    whole, point, tail = match["digits"].lower().partition(".")
    sign = "-" if "-" in match["sign"] + match["sign_within"] else ""
    return Based(sign + (whole.lstrip("0") or "0") + (point + tail.rstrip("0") if tail.rstrip("0") else ""), base)


def read_ratio(text: str) -> list[str] | None:
    """Reads the terms of `2:3`, `1:2:3` or `2 to 3`. A term such as 05 belongs to a time."""
    terms = [term.strip() for term in _RATIO_WORD.sub(":", text).split(":")]
    if len(terms) < 2 or not all(terms) or any(re.fullmatch(r"0\d+", term) for term in terms):
        return None
    return terms


def proportional(one: list[Fraction], other: list[Fraction]) -> bool:
    """Returns whether two ratios of numbers are equal."""
    if len(one) != len(other):
        return False
    return all(a * other[0] == b * one[0] for a, b in zip(one, other, strict=True)) and any(one) and any(other)
