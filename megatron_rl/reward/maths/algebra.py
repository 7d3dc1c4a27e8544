"""Comparison of two expressions: numbers to fifty digits, expressions with variables at many points.

The parser is that of math-verify (latex2sympy2-extended); math-verify itself compares what has no value at points.
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef

from .names import name_of_alias, plain_names, with_factors
from .numbers import close
from .points import Unsupported, same_at_points
from .wording import has_words

# math-verify warns once per process that its timeouts are off. They are off here on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

LONGEST = 600
"""Longest text in characters. The parser's time grows with the square of the length, and labels are far shorter."""
DEEPEST_BRACES, DEEPEST_PARENTHESES = 20, 7
"""Deepest nesting. The parser backtracks, so each further pair of parentheses doubles its time."""
LARGEST_BITS = 100_000.0
MOST_TERMS = 2_000
"""Most terms of an expanded power of a sum, or of a sum without a formula."""
DIGITS = 60
AGREEING_DIGITS = 50
_MISREAD = re.compile(r"!!|\\pmod|[\d)]_\{|\d'")
"""What the parser reads as something else: double factorials, congruences, indices of numbers, minutes of arc."""
_VECTOR = r"\\(?:(?:vec|overrightarrow)\{[^{}]*\}|hat\{ ?\\?[ijknrxyz](?:math)? ?\})"
_VECTOR_PRODUCT = re.compile(rf"{_VECTOR}(?:_\{{[^{{}}]*\}})? ?\)?\\times|\\times ?\(?[\d.]* ?{_VECTOR}")
"""What the parser reads as a product of numbers. Vector products are compared as texts."""
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_INFINITY = re.compile(r"[+-]?\\infty")
_POWER_OF_INFINITY = re.compile(r"\\infty[)}]*\^")
_SIDE = re.compile(r"\^\{[+-]\}")
_LIMIT = re.compile(r"\\lim(?![a-zA-Z])")
_WHOLE = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)
"""Operators that are computed before the comparison."""


class TooLarge(ValueError):
    """An expression that would take too long to parse or to evaluate."""


class Unparsable(ValueError):
    """A text that the parser cannot read as an expression, or an expression without a value."""


@lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """Parses normalised LaTeX into an expression or a matrix.

    Raises TooLarge if parsing or evaluating the text would take too long, and Unparsable if it is no expression.
    """
    if len(text) > LONGEST or _depth(text, "{", "}") > DEEPEST_BRACES:
        raise TooLarge("too long or too deeply nested")
    if _depth(text, "([", ")]") > DEEPEST_PARENTHESES:
        raise TooLarge("too deeply nested")
    if _MISREAD.search(text) or _VECTOR_PRODUCT.search(text) or has_words(text):
        raise Unparsable(text)
    try:
        expression = latex2sympy(
            plain_names(text), is_real=True, normalization_config=None, conversion_config=_CONVERSION
        )
    except Exception as error:  # the parser raises plain Exception, and conversions raise whatever sympy does
        raise Unparsable(text) from error
    if isinstance(expression, sympy.MatrixBase):
        return expression
    if not isinstance(expression, sympy.Expr | sympy.MatrixExpr):
        raise Unparsable(text)
    size(expression)
    expression = _from_both_sides(expression, text)
    if not _has_value(expression, text):
        raise Unparsable(text)
    return _with_plain_symbols(expression, text)


def _from_both_sides(expression: Any, text: str) -> Any:
    r"""Makes limits at a point two-sided if the text names no side. The parser reads them as limits from the right.

    Raises Unparsable if the text names sides for some of its limits only, because the parser does not say for which.
    """
    limits = [limit for limit in expression.atoms(sympy.Limit) if limit.args[2] not in (sympy.oo, -sympy.oo)]
    if not limits:
        return expression
    if _SIDE.search(text):
        if len(_LIMIT.findall(text)) > len(_SIDE.findall(text)):
            raise Unparsable(text)
        return expression
    return expression.xreplace({limit: sympy.Limit(*limit.args[:3], dir="+-") for limit in limits})


def _has_value(expression: Any, text: str) -> bool:
    r"""Returns whether no part is undefined or infinite, as `\frac{1}{0}`, `\tan 90^\circ` and `2\infty` are to sympy.

    The infinities alone have a value, and sums and limits may have infinite bounds. The parser computes `\infty^0`.
    """
    if expression.has(sympy.zoo, sympy.nan):
        return False
    if not expression.has(sympy.oo, -sympy.oo) or expression.has(*_WHOLE) or _INFINITY.fullmatch(text):
        return True
    return not _POWER_OF_INFINITY.search(text) and not _done(expression).has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)


def same_expression(gold: str, answer: str, scale: Fraction = Fraction(1)) -> bool:
    """Returns whether `answer` times `scale` equals `gold`. Both are normalised LaTeX.

    Raises TooLarge or Unparsable.
    """
    gold, answer = with_factors(gold, answer)
    return same_value(read(gold), read(answer), scale)


def same_value(a: Any, b: Any, scale: Fraction = Fraction(1)) -> bool:
    """Returns whether `b` times `scale` equals `a`. Both are results of `read`."""
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) or isinstance(b, sympy.MatrixBase | sympy.MatrixExpr):
        return _same_matrix(a, b, scale)
    factor = sympy.Rational(scale.numerator, scale.denominator)
    infinities = {a, b} & {sympy.oo, -sympy.oo}
    a, b = _computed(a), _computed(b) * factor
    if infinities:
        return bool(a == b)
    if not a.free_symbols and not b.free_symbols:
        return _same_number(a, b)
    try:
        return same_at_points(a, b)
    except Unsupported:
        return bool(verify(a, b, timeout_seconds=None))


def _same_matrix(a: Any, b: Any, scale: Fraction) -> bool:
    if not all(isinstance(side, sympy.MatrixBase | sympy.MatrixExpr) for side in (a, b)):
        return False
    a, b = a.doit(), b.doit()
    if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase) and a.shape == b.shape):
        return scale == 1 and bool(a == b)
    return all(same_value(one, other, scale) for one, other in zip(a.flat(), b.flat(), strict=True))


def _with_plain_symbols(expression: Any, text: str) -> Any:
    r"""Reads `i` as the imaginary unit, roots of negative numbers as real, and what has no value as a name of its own.

    Calls of unknown functions, derivatives, and sums and limits over them (`\lim_{x\to0^+} f(x)`) have no value.
    """
    bound = {str(name) for limits in expression.atoms(*_WHOLE) for name in getattr(limits, "variables", ())}
    sides = _SIDE.findall(text)  # the parser reads a limit without a side as one from the right
    unknown = expression.atoms(AppliedUndef, sympy.Derivative)
    named = {part: sympy.Symbol(f"name {sympy.srepr(part)}", real=True) for part in unknown}
    for whole in expression.atoms(*_WHOLE):
        if _is_over_unknown(whole):
            named[whole] = sympy.Symbol(f"name {sympy.srepr(whole)} {sides}", real=True)
    expression = expression.xreplace(named)
    expression = expression.xreplace({power: -((-power.base) ** power.exp) for power in _real_roots(expression)})
    if "i" in bound:
        return expression
    return expression.xreplace({name: sympy.I for name in expression.free_symbols if str(name) == "i"})


def _is_over_unknown(whole: Any) -> bool:
    """Returns whether the bound variable stands in a call or an index, which are names to the parser."""
    variables = {str(whole.args[1])} if isinstance(whole, sympy.Limit) else {str(name) for name in whole.variables}
    body = whole.args[0]
    calls = [str(call) for call in body.atoms(AppliedUndef)]
    hidden = [name_of_alias(str(symbol)) for symbol in body.free_symbols]
    inside = [re.sub(r"\\[a-zA-Z]+", "", name) for name in (*calls, *hidden)]
    return any(variable in name for variable in variables for name in inside)


def _real_roots(expression: Any) -> list[Any]:
    powers = expression.atoms(sympy.Pow)
    return [power for power in powers if power.base.is_Number and power.base < 0 and _is_odd_root(power.exp)]


def _is_odd_root(exponent: Any) -> bool:
    return bool(exponent.is_Rational and exponent.p == 1 and exponent.q > 1 and exponent.q % 2)


def _computed(expression: Any) -> Any:
    if not expression.has(*_WHOLE):
        return expression
    value = _done(expression)
    if value.has(sympy.zoo, sympy.nan):
        raise Unparsable(str(expression))
    return value


def _done(expression: Any) -> Any:
    try:
        return expression.doit()
    except ValueError as error:  # a limit that differs on both sides
        raise Unparsable(str(expression)) from error


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
    if isinstance(expression, sympy.Sum | sympy.Product):
        return _repeated_bits(expression, parts[0])
    if isinstance(expression, sympy.factorial | sympy.binomial | sympy.ff | sympy.rf):
        return parts[0] * 2.0 ** min(parts[0], 64.0)
    return sum(parts) if isinstance(expression, sympy.Mul) else max(parts, default=1.0) + len(parts)


def _repeated_bits(expression: sympy.Basic, bits: float) -> float:
    """Bounds the value from the number of terms. Raises TooLarge for many terms of a sum that has no formula."""
    term, (variable, first, last) = expression.args[:2]
    terms = max(float(last - first) + 1, 1.0) if first.is_Integer and last.is_Integer else 1.0
    if isinstance(expression, sympy.Product):
        return bits * terms
    if terms > MOST_TERMS and not term.is_polynomial(variable):
        raise TooLarge("a sum of too many terms")
    return bits + math.log2(terms)


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


def exact(expression: Any) -> Any:
    """Returns the expression with fractions in place of decimals."""
    return expression.xreplace({number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)})


def _same_number(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    a, b = gold.doit(), answer.doit()
    if isinstance(a, sympy.Integer):
        b = exact(b)  # an integer is not rounded
    if isinstance(a, sympy.Rational) and isinstance(b, sympy.Rational):
        return bool(a == b)
    try:
        x, y = sympy.N(a, DIGITS), sympy.N(b, DIGITS)
    except ValueError as error:  # a sum that diverges
        raise Unparsable(str(error)) from error
    except PrecisionExhausted as error:  # `\lfloor 10^{1000}\pi\rfloor`
        raise TooLarge("a number with too many digits") from error
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return False
    difference, larger = abs(x - y), max(abs(x), abs(y))
    if difference <= larger * sympy.Float(10, DIGITS) ** -AGREEING_DIGITS:
        return True
    rounded = a.has(sympy.Float) or b.has(sympy.Float)
    return bool(rounded and x.is_real and y.is_real and close(Fraction(str(x)), Fraction(str(y))))


def _depth(text: str, opening: str, closing: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in opening) - (character in closing)
        deepest = max(deepest, depth)
    return deepest
