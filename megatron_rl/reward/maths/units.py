"""Units of answers: separation of the number from its unit, and conversion between units of the same kind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

_KINDS: dict[str, dict[str, str]] = {
    "length": {
        "mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000", "inch": "0.0254", "in": "0.0254",
        "foot": "0.3048", "ft": "0.3048", "yard": "0.9144", "yd": "0.9144", "mile": "1609.344", "mi": "1609.344",
        "millimeter": "1/1000", "centimeter": "1/100", "meter": "1", "kilometer": "1000",
    },
    "time": {
        "ms": "1/1000", "s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600",
        "hour": "3600", "day": "86400", "week": "604800",
    },
    "mass": {"mg": "1/1000000", "g": "1/1000", "kg": "1", "gram": "1/1000", "kilogram": "1", "lb": "0.45359237",
             "pound": "0.45359237", "oz": "0.028349523125", "ounce": "0.028349523125"},
    "money": {"dollar": "1", r"\$": "1", "cent": "1/100"},
    "volume": {"ml": "1/1000", "l": "1", "liter": "1", "litre": "1", "milliliter": "1/1000"},
}  # fmt: skip
_TABLE = {name: (kind, Fraction(factor)) for kind, names in _KINDS.items() for name, factor in names.items()}
_SPELLINGS = {"feet": "foot", "inches": "inch", "metre": "meter", "mph": "mile/hour", "kph": "km/hour"}
_BARE = [name for name in (*_TABLE, *_SPELLINGS, "degree", "unit") if name.isalpha() and len(name) > 1 and name != "in"]

_TEXT_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textrm|rm)\s*\{(?P<unit>[^{}\\\d]*)\}(?P<power>\^\{?[23]\}?)?$")
_BARE_UNIT = re.compile(rf"(?<=[\d}}) ])\s*(?P<unit>(?:{'|'.join(sorted(_BARE, key=len, reverse=True))})e?s?)"
                        r"(?P<power>\^\{?[23]\}?)?$")  # fmt: skip
_PERCENT = re.compile(r"(?:\\?%|\\text\s*\{ ?percent ?\}| percent)$")
_DEGREE = re.compile(r"\^ ?\{? ?\\circ ?\}?$")
_BASE = re.compile(r"(?<=[0-9A-Fa-f])_ ?\{? ?(?P<base>[2-9]|1\d|two|three|eight|sixteen)\}?$")
_NOT_A_UNIT = re.compile(r"\b(?:or|and|not|no|more|less|least|most|than|about|between|if|for|when|where|mod|is|th)\b")


@dataclass(frozen=True)
class Unit:
    """The unit of an answer."""

    name: str
    kinds: dict[str, int] = field(default_factory=dict)
    """Power of each kind of quantity; empty for a word that is no known unit."""
    factor: Fraction = Fraction(1)
    """Size of the unit in base units of its kinds."""


PERCENT = Unit("percent", {"share": 1}, Fraction(1, 100))
DEGREE = Unit("degree", {"angle": 1})


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Separates a text from its unit: `5 \text{ cm}` -> `5` and centimetres.

    Percent signs (`9\%`), degrees (`90^\circ`), currencies (`\$5`) and number bases (`101_2`) count as units. A text
    without a unit is returned unchanged with None.
    """
    for pattern, unit in ((_PERCENT, PERCENT), (_DEGREE, DEGREE)):
        if (match := pattern.search(text)) and match.start():
            return text[: match.start()].strip(), unit
    if (match := _BASE.search(text)) and text[: match.start()].isalnum():
        return text[: match.start()], Unit(f"base {match['base']}", {f"base {match['base']}": 1})
    if text.startswith(r"\$"):
        return split_unit(text[2:].strip())[0], read_unit(r"\$", "")
    if text.endswith(r"\$"):
        return text[:-2].strip(), read_unit(r"\$", "")
    match = _TEXT_UNIT.search(text) or _BARE_UNIT.search(text)
    if match and text[: match.start()].strip() and not _NOT_A_UNIT.search(match["unit"].lower()):
        return text[: match.start()].strip(), read_unit(match["unit"], match["power"] or "")
    return text, None


def in_radians(
    gold: tuple[str, Unit | None], answer: tuple[str, Unit | None]
) -> tuple[tuple[str, Unit | None], tuple[str, Unit | None]]:
    r"""Converts the side in degrees to radians if the other side contains \pi and has no unit.

    Otherwise both sides are returned unchanged.
    """
    if gold[1] == DEGREE and not answer[1] and r"\pi" in answer[0]:
        return (rf"\frac{{\pi}}{{180}}\cdot({gold[0]})", None), answer
    if answer[1] == DEGREE and not gold[1] and r"\pi" in gold[0]:
        return gold, (rf"\frac{{\pi}}{{180}}\cdot({answer[0]})", None)
    return gold, answer


def read_unit(name: str, power: str) -> Unit | None:
    """Reads a unit such as `square cm`, `cm` with power `^2` or `m/s`. An unknown word becomes a unit without kinds."""
    text = name.strip().lower().rstrip(".")
    exponent = int(power.strip("^{} ") or 1)
    for word, meant in (("square", 2), ("sq", 2), ("cubic", 3)):
        if text.startswith(f"{word} "):
            text, exponent = text.removeprefix(word).strip(), meant
    kinds: dict[str, int] = {}
    factor = Fraction(1)
    for index, part in enumerate(_spelled(text).replace(" per ", "/").split("/")):
        known = _lookup(part.strip())
        if known is None:
            return DEGREE if _singular(text) == "degree" else Unit(_singular(text))
        sign = exponent if index == 0 else -1
        kinds[known[0]] = kinds.get(known[0], 0) + sign
        factor *= known[1] ** sign
    return Unit(text, kinds, factor)


def _lookup(name: str) -> tuple[str, Fraction] | None:
    return _TABLE.get(name) or _TABLE.get(_singular(name))


def _singular(name: str) -> str:
    name = _SPELLINGS.get(name, name)
    return name.removesuffix("s") if len(name) > 2 and name.endswith("s") else name


def _spelled(name: str) -> str:
    return _SPELLINGS.get(name) or _SPELLINGS.get(name.removesuffix("s")) or name
