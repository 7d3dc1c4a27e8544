"""Comparison of two expressions: numbers to fifty digits, everything else by math-verify."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from .numbers import close

# math-verify warns once per process that its timeouts are off. They are off here on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LONGEST = 600
"""Longest text in characters. The parser's time grows with the square of the length, and labels are far shorter."""
DEEPEST_BRACES, DEEPEST_PARENTHESES = 20, 7
"""Deepest nesting. The parser backtracks, so each further pair of parentheses doubles its time."""
LARGEST_BITS = 100_000.0
MOST_TERMS = 2_000
"""Most terms of an expanded power of a sum."""
DIGITS = 60
AGREEING_DIGITS = 50

# Units are removed before parsing: with math-verify's own units, `2c` is 2, and `5 \text{ km}` equals `5 \text{ m}`.
_READING = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
        )
    )
]


class TooLarge(ValueError):
    """An expression that would take too long to parse or to evaluate."""


@lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """Parses a text with math-verify and returns the expression, or the text itself if it finds none.

    Raises TooLarge if parsing or evaluating the text would take too long.
    """
    if len(text) > LONGEST or _depth(text, "{", "}") > DEEPEST_BRACES:
        raise TooLarge("too long or too deeply nested")
    if _depth(text, "([", ")]") > DEEPEST_PARENTHESES:
        raise TooLarge("too deeply nested")
    found = parse(rf"\boxed{{{text}}}", _READING, parsing_timeout=None)
    expression = found[0] if found else text
    if isinstance(expression, sympy.Basic):
        size(expression)
    return expression


def same_expression(gold: Any, answer: Any, scale: Fraction) -> bool:
    """Returns whether `answer` times `scale` equals `gold`. Both are results of `read`."""
    a, b = _as_number(gold), _as_number(answer)
    if a is not None and b is not None:
        return _same_value(a, b * sympy.Rational(scale.numerator, scale.denominator))
    if scale != 1:
        return False
    # The order matters: the label decides between the meanings of a pair, an interval or an equation.
    return bool(verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None))


def size(expression: sympy.Basic) -> float:
    """Returns an upper bound of |log2| of a number's value.

    Raises TooLarge if the value of the expression or of a part of it would be too large to compute.
    """
    parts = [size(argument) for argument in expression.args if isinstance(argument, sympy.Basic)]
    bits = _bits(expression, parts)
    if not bits <= LARGEST_BITS:
        raise TooLarge("a number or a power too large to compute")
    return bits


def _bits(expression: sympy.Basic, parts: list[float]) -> float:
    if isinstance(expression, sympy.Rational):
        return float(max(abs(expression.p).bit_length(), expression.q.bit_length()))
    if isinstance(expression, sympy.Float):
        return abs(float(sympy.log(abs(expression), 2).evalf(5))) if expression else 0.0
    if isinstance(expression, sympy.Pow):
        return _power_bits(expression, *parts)
    if isinstance(expression, sympy.exp):
        return 1.5 * 2.0 ** min(parts[0], 64.0)
    if isinstance(expression, sympy.factorial | sympy.binomial | sympy.ff | sympy.rf):
        return parts[0] * 2.0 ** min(parts[0], 64.0)
    return sum(parts) if isinstance(expression, sympy.Mul) else max(parts, default=1.0) + len(parts)


def _power_bits(power: sympy.Pow, base_bits: float, exponent_bits: float) -> float:
    base, exponent = power.args
    times = abs(float(exponent)) if isinstance(exponent, sympy.Number) else 2.0 ** min(exponent_bits, 64.0)
    if not base.free_symbols and not exponent.free_symbols:
        return max(base_bits, 1.0) * max(times, 1.0)
    if isinstance(base, sympy.Add) and exponent.is_number and exponent_bits > 1:
        terms = len(base.args)
        if times > MOST_TERMS or math.comb(int(times) + terms - 1, terms - 1) > MOST_TERMS:
            raise TooLarge("a power of a sum with too many terms")
    return base_bits if exponent.free_symbols else base_bits + math.log2(max(times, 1.0))


def _as_number(expression: Any) -> sympy.Expr | None:
    """Returns the expression if it is a number, and None otherwise.

    The parser reads `i` as a variable; it counts as the imaginary unit if it is the only one.
    """
    if isinstance(expression, sympy.Equality) and isinstance(expression.lhs, sympy.Symbol):
        return None
    if not isinstance(expression, sympy.Expr):
        return None
    names = expression.free_symbols
    if not names:
        return expression
    if {str(name) for name in names} == {"i"}:
        return expression.subs(dict.fromkeys(names, sympy.I))
    return None


def _same_value(a: sympy.Expr, b: sympy.Expr) -> bool:
    a, b = a.doit(), b.doit()
    if isinstance(a, sympy.Rational) and isinstance(b, sympy.Rational):
        return bool(a == b)
    x, y = sympy.N(a, DIGITS), sympy.N(b, DIGITS)
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return bool(x == y and x.is_infinite)
    difference, larger = abs(x - y), max(abs(x), abs(y))
    if difference <= larger * sympy.Float(10, DIGITS) ** -AGREEING_DIGITS:
        return True
    rounded = a.has(sympy.Float) or b.has(sympy.Float)
    return rounded and x.is_real and y.is_real and close(Fraction(str(x)), Fraction(str(y)))


def _depth(text: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in opening) - (character in closing)
        deepest = max(deepest, depth)
    return deepest
