"""Units of answers: separation of a number from its unit, and conversion between units of the same kind."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from fractions import Fraction

from .numbers import read_number
from .scan import tokens
from .unit_table import CHANGING, CURRENCY_SIGNS, IRREGULAR_PLURALS, MULTIPLES, SHARES, UNITS


@dataclass(frozen=True)
class Unit:
    """The unit of an answer, or the things that it counts."""

    kinds: dict[str, int] = field(default_factory=dict)
    """Power of each basic quantity. A thing that is counted is a quantity of its own."""
    factor: Fraction = Fraction(1)
    """Size of the unit in basic units."""
    scale: Fraction = Fraction(1)
    """Factor that a word such as `million` applies to the number itself."""


PERCENT = Unit({"percent": 1}, Fraction(1, 100))
DEGREE = Unit({"angle": 1})
RADIAN = Unit({"radian": 1})
_MINUTE_OF_ARC, _SECOND_OF_ARC = Unit({"angle": 1}, Fraction(1, 60)), Unit({"angle": 1}, Fraction(1, 3600))
_OF_ARC = {"^\\circ": DEGREE, "'": _MINUTE_OF_ARC, "''": _SECOND_OF_ARC, '"': _SECOND_OF_ARC}
_CELSIUS, _FAHRENHEIT = Unit({"celsius": 1}), Unit({"fahrenheit": 1})
_PERCENT = re.compile(r" ?(?:\\?%|\\text\{ ?per ?cent ?\}| ?\bper ?cent)$")
_DEGREES = re.compile(r"\^\\circ ?(?:(?P<scale>[CFK])|\\text\{ ?(?P<worded>[CFK]) ?\})?$")
_ARGUMENT = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{-?\d+\})?[({]?[\d.]+$")
_FACTOR = re.compile(r"(?P<name>\\mu[a-zA-Z]+|[a-zA-Z]?\\Omega|\\\$|[^\W\d_]+\.?|[€£¥₹¢])(?:\^\{(?P<power>-?\d+)\})?")
_PLAIN_NUMBER = re.compile(r"[+-]?[\d.,]+(?:/\d+)?|[+-]?\d*\\frac\{\d+\}\{\d+\}")
_MIXED_PART = re.compile(
    r"(?P<number>\d+(?:\.\d+)?(?:/\d+)?|\\frac\{\d+\}\{\d+\}) ?(?P<unit>\^\\circ|''|['\"]|[^\d\\^'\"]+) ?"
)
_NOUN = re.compile(r"[^\W\d_]{3,}(?:['\u2019-][^\W\d_]+)*")
_NUMERAL = re.compile(
    r"(?:teen|tie|fif|six|seven|eigh|nin|ten|eleven|twelf|hundred|thousand|llion)ths?$|llions?$|teens?$"
)
_CURRENCY_OF = {"USD": r"\$", r"US\$": r"\$", "EUR": "€", "GBP": "£", "Rs": "₹"}
_NAMED_CURRENCY = re.compile(r"(?:\\text\{ ?)?(?P<name>USD|US\\\$|EUR|GBP|Rs\.?) ?\}? ?(?=[\d.])")
_OPENS_UNIT = (r"\text", r"\$", r"\mu", r"\Omega", *"€£¥₹¢")
_SHORT = re.compile(r"(?: (?:in (?:total|all)|total|altogether|old|each|apiece|long|wide|tall|high|deep|away))$")


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Separates a text from its unit: `5\text{ cm}` -> `5` and centimetres.

    Percent signs (`9\%`), degrees (`90^\circ`), currencies (`\$5`) and things that are counted (`36 apples`) are units.
    A text without a unit, or whose words may change the number (`34 or more`), is returned unchanged with None.
    """
    text = text.strip()
    if (match := _PERCENT.search(text)) and match.start():
        return text[: match.start()].strip(), PERCENT
    if (match := _DEGREES.search(text)) and match.start() and not _ARGUMENT.search(text[: match.start()]):
        scale = match["scale"] or match["worded"]
        of_scale = {"C": _CELSIUS, "F": _FAHRENHEIT, "K": Unit({"temperature": 1})}
        return text[: match.start()].strip(), of_scale.get(scale, DEGREE)
    if match := _NAMED_CURRENCY.match(text):
        return split_unit(rf"{_CURRENCY_OF[match['name'].rstrip('.')]}{text[match.end() :]}")
    for sign in CURRENCY_SIGNS:
        if text.startswith(sign) or text.startswith(f"-{sign}"):
            minus, rest = ("-", text[1:]) if text.startswith("-") else ("", text)
            value, unit = split_unit(rest.removeprefix(sign).strip())
            if unit is None or unit.kinds == UNITS[sign].kinds or not unit.kinds:
                return minus + value, Unit(UNITS[sign].kinds, UNITS[sign].factor, unit.scale if unit else Fraction(1))
            if all(power < 0 for power in unit.kinds.values()):
                return minus + value, _product(Unit(*UNITS[sign]), unit)
            return text, None
    return _trailing_unit(text)


def mixed_quantity(text: str) -> tuple[Fraction, Unit] | None:
    r"""Reads quantities of one kind in falling units, such as `1\text{ h }30\text{ min}`, in the units of the last."""
    text = re.sub(r"\\text\{ ?and ?\}| and |, ?", " ", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)).strip()
    text = re.sub(r" +", " ", text)
    found: list[tuple[Fraction, Unit]] = []
    end = 0
    while match := _MIXED_PART.match(text, end):
        name = match["unit"].strip()
        # Without degrees before them, the marks are minutes and seconds of arc as well as feet and inches.
        unit = (_OF_ARC.get(name) if name == "^\\circ" or found else None) or read_unit(name)
        number = read_number(match["number"])
        if unit is None or unit.scale != 1 or number is None:
            return None
        found.append((number.value, unit))
        end = match.end()
    if end != len(text) or len(found) < 2 or len({tuple(unit.kinds.items()) for _, unit in found}) > 1:
        return None
    sizes = [unit.factor for _, unit in found]
    if len(found[0][1].kinds) != 1 or any(one <= other for one, other in itertools.pairwise(sizes)):
        return None
    return sum((number * unit.factor for number, unit in found), Fraction(0)) / sizes[-1], found[-1][1]


def read_unit(text: str) -> Unit | None:
    """Reads a unit such as `square cm`, `kg/m^{3}` or `dollars per hour`, or things such as `red apples`."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\bdegrees? (?=celsius|fahrenheit)", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\\mu\s+", r"\\mu", text)
    text = re.sub(r"\s+", " ", re.sub(r"\\cdot|\\times|[*·]|(?<=[a-zA-Z])-(?=[a-zA-Z])", " ", text)).strip(" .")
    text = re.sub(r" +(?=\^)|(?<=\b[a-zA-Z]) +(?=\\Omega)", "", text)
    scale = Fraction(1)
    while (word := text.partition(" ")[0].lower()) in MULTIPLES or word.removesuffix("s") in SHARES or word in SHARES:
        singular = word.removesuffix("s")
        scale *= MULTIPLES[word] if word in MULTIPLES else Fraction(1, SHARES.get(word) or SHARES[singular])
        text = text.partition(" ")[2].removeprefix("of a ").removeprefix("of ")
    if not text:
        return Unit(scale=scale) if scale != 1 else None
    text = _SHORT.sub("", text)
    unit = _known(text) or _things(text)
    return Unit(unit.kinds, unit.factor, scale) if unit else None


def _trailing_unit(text: str) -> tuple[str, Unit | None]:
    for token in tokens(text):
        if token.depth or not token.start or not (token.text.isalpha() or token.text in _OPENS_UNIT):
            continue
        value, tail = text[: token.start].rstrip(), text[token.start :]
        if value.endswith((r"\cdot", r"\times")) or value[-1] in "^_+-*/=<>,":
            continue
        if value[-1].isalpha() and not re.search(r"\\[a-zA-Z]+$", value) and token.text != r"\text":
            continue
        is_bare = token.text.isalpha()
        if is_bare and not _may_be_bare(value, tail, spaced=text[token.start - 1] == " "):
            continue
        if (unit := read_unit(tail)) is not None:
            return value, unit
        if token.text == r"\text":
            break
    return text, None


def _may_be_bare(value: str, tail: str, spaced: bool) -> bool:
    """Letters without \\text are a product of variables, unless a plain number or a longer word says no."""
    first = re.match(r"[^\W\d_]+", tail)
    assert first is not None
    if len(first[0]) == 1:
        return spaced and bool(_PLAIN_NUMBER.fullmatch(value))
    plain = bool(_PLAIN_NUMBER.fullmatch(value))
    return plain or first[0] in UNITS or len(first[0]) > 3


def _known(text: str) -> Unit | None:
    kinds: dict[str, int] = {}
    factor = Fraction(1)
    for index, side in enumerate(re.sub(r"\bper\b|(?<=\w) a (?=\w)", "/", text).split("/")):
        pending = 1
        words = side.strip(" ()" if index else " ").split()
        if not words:
            return None
        for position, word in enumerate(words):
            if word.lower() in ("square", "sq", "sq.", "cubic", "cu"):
                pending = 2 if word.lower().startswith("sq") else 3
                continue
            if word.lower() in ("squared", "cubed"):
                continue
            match = _FACTOR.fullmatch(word)
            entry = _lookup(match["name"]) if match else None
            if match is None or entry is None:
                return None
            following = words[position + 1].lower() if position + 1 < len(words) else ""
            power = int(match["power"] or {"squared": 2, "cubed": 3}.get(following, pending)) * (-1 if index else 1)
            pending = 1
            for kind, exponent in entry.kinds.items():
                kinds[kind] = kinds.get(kind, 0) + exponent * power
            factor *= entry.factor**power
        if pending != 1:
            return None
    kinds = {kind: power for kind, power in sorted(kinds.items()) if power}
    return Unit(kinds, factor) if kinds else None


def _lookup(name: str) -> Unit | None:
    name = name.replace(" ", "")
    for spelled in (name, name.rstrip("."), name.lower() if len(name) > 2 else name):
        for singular in (spelled, spelled.removesuffix("s") if len(spelled) > 3 else spelled):
            if singular in UNITS:
                return Unit(UNITS[singular].kinds, UNITS[singular].factor)
    return None


def _things(text: str) -> Unit | None:
    """Reads the things that a number counts, in the plural: `apples`, `possible values`, `apples per day`."""
    counted, *rest = re.sub(r"\bper\b|/", "/", text).split("/")
    words = counted.strip().lower().split(" ")
    is_plural = words[-1] in IRREGULAR_PLURALS or (words[-1].endswith("s") and not words[-1].endswith("ss"))
    if (
        not all(_NOUN.fullmatch(word) and word not in CHANGING and not _NUMERAL.search(word) for word in words)
        or len(words) > 4
    ):
        return None
    if not is_plural:
        return None
    kinds = {f"thing {words[-1].removesuffix('s')}": 1}
    unit = Unit(kinds)
    for side in rest:
        below = _known(side.strip()) or (
            Unit({f"thing {side.strip().lower()}": 1}) if _NOUN.fullmatch(side.strip()) else None
        )
        if below is None:
            return None
        unit = _product(unit, Unit({kind: -power for kind, power in below.kinds.items()}, 1 / below.factor))
    return unit


def _product(one: Unit, other: Unit) -> Unit:
    kinds = {kind: one.kinds.get(kind, 0) + other.kinds.get(kind, 0) for kind in {*one.kinds, *other.kinds}}
    kinds = {kind: power for kind, power in sorted(kinds.items()) if power}
    return Unit(kinds, one.factor * other.factor, one.scale * other.scale)
