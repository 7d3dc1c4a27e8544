"""Units, currencies and count words, with their sizes."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple


class Entry(NamedTuple):
    """A unit: the power of each basic quantity, and the size in basic units."""

    kinds: dict[str, int]
    factor: Fraction


_LENGTH, _MASS, _TIME = {"length": 1}, {"mass": 1}, {"time": 1}
_AREA, _VOLUME = {"length": 2}, {"length": 3}
_FORCE = {"mass": 1, "length": 1, "time": -2}
_ENERGY = {"mass": 1, "length": 2, "time": -2}
_POWER = {"mass": 1, "length": 2, "time": -3}
_PRESSURE = {"mass": 1, "length": -1, "time": -2}
_SPEED = {"length": 1, "time": -1}
_CHARGE = {"current": 1, "time": 1}

# Symbols and words that take prefixes.
_METRIC: list[tuple[str, str, dict[str, int], str]] = [
    ("m", "meter metre", _LENGTH, "1"),
    ("g", "gram gramme", _MASS, "1/1000"),
    ("s", "second", _TIME, "1"),
    ("A", "ampere amp", {"current": 1}, "1"),
    ("K", "kelvin", {"temperature": 1}, "1"),
    ("mol", "mole", {"amount": 1}, "1"),
    ("L l", "liter litre", _VOLUME, "1/1000"),
    ("N", "newton", _FORCE, "1"),
    ("J", "joule", _ENERGY, "1"),
    ("W", "watt", _POWER, "1"),
    ("Pa", "pascal", _PRESSURE, "1"),
    ("Hz", "hertz", {"time": -1}, "1"),
    ("V", "volt", {**_POWER, "current": -1}, "1"),
    ("C", "coulomb", _CHARGE, "1"),
    ("F", "farad", {"mass": -1, "length": -2, "time": 4, "current": 2}, "1"),
    (r"\Omega", "ohm", {**_POWER, "current": -2}, "1"),
    ("T", "tesla", {"mass": 1, "time": -2, "current": -1}, "1"),
    ("Wb", "weber", {**_ENERGY, "current": -1}, "1"),
    ("eV", "electronvolt", _ENERGY, "1.602176634e-19"),
    ("cal", "calorie", _ENERGY, "4.184"),
    ("Wh", "", _ENERGY, "3600"),
    ("bar", "", _PRESSURE, "100000"),
]
_PREFIXES = {
    "p": ("pico", -12), "n": ("nano", -9), r"\mu": ("micro", -6), "u": ("micro", -6), "m": ("milli", -3),
    "c": ("centi", -2), "d": ("deci", -1), "k": ("kilo", 3), "M": ("mega", 6), "G": ("giga", 9), "T": ("tera", 12),
}  # fmt: skip
_PLAIN: list[tuple[str, dict[str, int], str]] = [
    ("in inch inches", _LENGTH, "0.0254"),
    ("ft foot feet", _LENGTH, "0.3048"),
    ("yd yard", _LENGTH, "0.9144"),
    ("mi mile", _LENGTH, "1609.344"),
    ("micron", _LENGTH, "1e-6"),
    ("min minute mins", _TIME, "60"),
    ("h hr hrs hour", _TIME, "3600"),
    ("day", _TIME, "86400"),
    ("week", _TIME, "604800"),
    ("sec secs", _TIME, "1"),
    ("lb lbs pound", _MASS, "0.45359237"),
    ("oz ounce", _MASS, "0.028349523125"),
    ("tonne", _MASS, "1000"),
    ("gm gms", _MASS, "1/1000"),
    ("kgs", _MASS, "1"),
    ("mph", _SPEED, "0.44704"),
    ("kph kmph kmh", _SPEED, "5/18"),
    ("hectare ha", _AREA, "10000"),
    ("acre", _AREA, "4046.8564224"),
    ("cc", _VOLUME, "1e-6"),
    ("gal gallon", _VOLUME, "0.003785411784"),
    ("atm", _PRESSURE, "101325"),
    ("erg", _ENERGY, "1e-7"),
    ("dyn dyne", _FORCE, "1e-5"),
    ("rad radian", {"radian": 1}, "1"),
    ("deg degree", {"angle": 1}, "1"),
    ("rpm", {"revolution": 1, "time": -1}, "1/60"),
    (r"\$ dollar buck usd USD", {"dollar": 1}, "1"),
    ("¢ cent penny pennies", {"dollar": 1}, "1/100"),
    ("€ euro eur EUR", {"euro": 1}, "1"),
    ("£ gbp GBP", {"sterling": 1}, "1"),
    ("¥ yen yuan", {"yen": 1}, "1"),
    ("₹ rupee Rs Rs.", {"rupee": 1}, "1"),
    ("celsius", {"celsius": 1}, "1"),
    ("fahrenheit", {"fahrenheit": 1}, "1"),
    ("month", {"month": 1}, "1"),
    ("year yr yrs", {"month": 1}, "12"),
    ("unit", {"unit": 1}, "1"),
]
MULTIPLES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7,
}  # fmt: skip
"""Words that multiply the number before them."""
SHARES = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000, "millionth": 10**6,
}  # fmt: skip
"""Words that divide the number before them, as in `34 thirds`."""
CURRENCY_SIGNS = (r"\$", "€", "£", "¥", "₹")
_IRREGULAR = "people children men women mice geese fish sheep deer dice oxen teeth feet"
IRREGULAR_PLURALS = frozenset(_IRREGULAR.split())
"""Plurals without a final s."""
_NUMERALS = """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety zero tens hundreds thousands
    millions billions trillions dozens quadrillion quadrillions score scores gross googol pair pairs couple
    couples twos threes fours fives halves thirds quarters fourths fifths sixths sevenths eighths ninths tenths
    hundredths thousandths twentieths
"""
_OPERATORS = """
    plus minus over under divided multiplied by squared cubed square-root root roots factorial factorials power
    powers exponent to the of a an negative positive below above less fewer more greater than at least most
    about around approximately nearly almost roughly up down between from or and not no nor but if for when
    where while unless mod modulo is are was be equals equal point percent percents per-cent percentage percents
    short off past ago before after until till remainder remaining left extra additional double triple twice
    half thrice inverse reciprocal log sin cos tan degrees-below base bases minus reduced increased with without
    except excluding including in on as into out
"""
CHANGING = frozenset(f"{_NUMERALS} {_OPERATORS}".split()) | frozenset(MULTIPLES) | frozenset(SHARES)
"""Words that change the number beside them, or leave open whether they do. They are never read as things counted."""


def _table() -> dict[str, Entry]:
    table: dict[str, Entry] = {}
    for symbols, words, kinds, size in _METRIC:
        factor = Fraction(size)
        for sign, (prefix, power) in {"": ("", 0), **_PREFIXES}.items():
            entry = Entry(kinds, factor * Fraction(10) ** power)
            table.update({sign + symbol: entry for symbol in symbols.split() if (sign + symbol) not in table})
            table.update({prefix + word: entry for word in words.split()})
    for names, kinds, size in _PLAIN:
        table.update({name: Entry(kinds, Fraction(size)) for name in names.split()})
    return table


UNITS = _table()
"""Every known unit by its symbol or its word in the singular."""
