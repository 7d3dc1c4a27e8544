"""Equality of expressions with variables: the values at many points, with real arithmetic."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import mpmath  # type: ignore[import-untyped]
import sympy

DIGITS = 30
_TOLERANCE = mpmath.mpf(10) ** -20
_ROUNDED_TOLERANCE = mpmath.mpf(10) ** -6
"""Relative tolerance if an expression contains a decimal."""
_NOISE = mpmath.mpf(10) ** -24
_POINTS = 30
_ENOUGH = 4
"""Points at which both expressions must have a value."""

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.exp: mpmath.exp, sympy.sin: mpmath.sin, sympy.cos: mpmath.cos, sympy.tan: mpmath.tan, sympy.cot: mpmath.cot,
    sympy.sec: mpmath.sec, sympy.csc: mpmath.csc, sympy.asin: mpmath.asin, sympy.acos: mpmath.acos,
    sympy.atan: mpmath.atan, sympy.acot: mpmath.acot, sympy.asec: mpmath.asec, sympy.acsc: mpmath.acsc,
    sympy.sinh: mpmath.sinh, sympy.cosh: mpmath.cosh, sympy.tanh: mpmath.tanh, sympy.asinh: mpmath.asinh,
    sympy.acosh: mpmath.acosh, sympy.atanh: mpmath.atanh, sympy.Abs: abs, sympy.floor: mpmath.floor,
    sympy.ceiling: mpmath.ceil, sympy.factorial: mpmath.factorial, sympy.gamma: mpmath.gamma,
    sympy.binomial: mpmath.binomial, sympy.Max: max, sympy.Min: min,
    sympy.Mod: lambda a, b: a - b * mpmath.floor(a / b),
    sympy.Add: lambda *terms: mpmath.fsum(terms), sympy.Mul: lambda *factors: mpmath.fprod(factors),
    sympy.UnevaluatedExpr: lambda value: value, sympy.log: mpmath.log,
}  # fmt: skip


_COUNTS = frozenset("ijklmnpqKMN")
"""Names of whole numbers, for which floor and ceiling may have to be compared."""


class NoValue(ArithmeticError):
    """An expression has no (real) value at a point."""


class Unsupported(ValueError):
    """An expression contains something that has no value at a point, such as an integral."""


def same_at_points(a: sympy.Basic, b: sympy.Basic) -> bool:
    """Returns whether both expressions have the same value wherever both have one.

    Values are real unless an expression contains the imaginary unit: `\\sqrt{ab}` is undefined for negative a, so it
    equals `\\sqrt{a}\\sqrt{b}`. If both sides have roots of variables, the variables are positive. If only one side has
    absolute values, both sides must also be defined at the same points, so that `\\ln|x|` is not `\\ln x`. Raises
    Unsupported if an expression has no value at points.
    """
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    is_real = not (a.has(sympy.I) or b.has(sympy.I))
    tolerance = _ROUNDED_TOLERANCE if a.has(sympy.Float) or b.has(sympy.Float) else _TOLERANCE
    same_domain = a.has(sympy.Abs) != b.has(sympy.Abs)
    # Equal terms vanish from the difference, so that `100!` does not hide the C of `100!+C`.
    if tolerance == _TOLERANCE and _remains(a - b, names, is_real):
        return False
    with mpmath.workdps(DIGITS):
        if is_real and _has_roots(a) and _has_roots(b) and not same_domain:
            positive = _agree(a, b, _points(names, (1,)), is_real, tolerance, same_domain)
            if positive is not None:
                return positive
        everywhere = _agree(a, b, _points(names), is_real, tolerance, same_domain)
        counts = all(str(name) in _COUNTS for name in names) and _has_steps(a) and _has_steps(b)
        if everywhere or (everywhere is False and not counts):
            return everywhere
        return bool(_agree(a, b, _points(names, whole=True), is_real, tolerance, same_domain))


def _remains(difference: sympy.Basic, names: list[Any], is_real: bool) -> bool:
    """Returns whether a difference is, at some positive point, of the size of its own terms."""
    with mpmath.workdps(DIGITS):
        for point in itertools.islice(_points(names, (1,), whole=_has_steps(difference)), _ENOUGH):
            values = [_value(term, point, is_real) for term in sympy.Add.make_args(difference)]
            if None not in values and abs(mpmath.fsum(values)) > mpmath.mpf(10) ** -3 * max(map(abs, values)) > _NOISE:
                return True
    return False


def _has_steps(expression: sympy.Basic) -> bool:
    return bool(expression.has(sympy.floor, sympy.ceiling, sympy.Mod))


def _has_roots(expression: sympy.Basic) -> bool:
    return any(power.base.free_symbols and not power.exp.is_Integer for power in expression.atoms(sympy.Pow))


def _agree(
    a: sympy.Basic, b: sympy.Basic, points: Iterator[dict[Any, Any]], is_real: bool, tolerance: Any, same_domain: bool
) -> bool | None:
    """Returns whether the values agree, or None if there are too few points with values."""
    compared = 0
    for point in points:
        x, y = _value(a, point, is_real), _value(b, point, is_real)
        if x is None or y is None:
            if same_domain and (x is None) != (y is None):
                return False
            continue
        # Terms may cancel to a rounding error of zero.
        is_noise = tolerance == _TOLERANCE and abs(x - y) < _NOISE
        if abs(x - y) > tolerance * max(abs(x), abs(y)) and not is_noise:
            return False
        compared += 1
    return True if compared >= _ENOUGH else None


def _points(names: list[Any], signs: tuple[int, ...] = (1, -1), whole: bool = False) -> Iterator[dict[Any, Any]]:
    """Yields small and large, positive and negative, broken and whole values, always the same ones."""
    draw = random.Random(len(names))
    for index in range(_POINTS):
        if whole or index % 5 == 4:
            yield {name: mpmath.mpf(draw.randint(1, 12)) for name in names}
        else:
            largest = (7000, 29000)[index % 2]
            allowed = signs if index % 5 > 1 else (1,)
            yield {name: mpmath.mpf(draw.randint(500, largest)) / 9973 * draw.choice(allowed) for name in names}


def _value(expression: sympy.Basic, point: dict[Any, Any], is_real: bool) -> Any:
    try:
        return value_at(expression, point, is_real)
    except (NoValue, ZeroDivisionError, OverflowError):
        return None


def value_at(expression: Any, point: dict[Any, Any], is_real: bool) -> Any:
    """Returns the value of an expression at a point. Raises NoValue or ZeroDivisionError if it has none there."""
    if expression in point:
        return point[expression]
    if expression == sympy.I:
        return mpmath.mpc(0, 1)
    if isinstance(expression, sympy.Number | sympy.NumberSymbol):
        if not expression.is_finite:
            raise NoValue
        return mpmath.mpmathify(sympy.N(expression, DIGITS + 5)._to_mpmath(mpmath.mp.prec))
    values = [value_at(argument, point, is_real) for argument in expression.args]
    try:
        if isinstance(expression, sympy.Pow):
            value = _power(values[0], values[1], is_real)
        elif type(expression) in _FUNCTIONS:
            value = _FUNCTIONS[type(expression)](*values)
        else:
            raise Unsupported(type(expression).__name__)
    except (ValueError, TypeError) as error:
        if isinstance(error, Unsupported):
            raise
        raise NoValue from error
    if is_real and isinstance(value, mpmath.mpc):
        if value.imag != 0:
            raise NoValue
        value = value.real
    if not mpmath.isfinite(value):
        raise NoValue
    return value


def _power(base: Any, exponent: Any, is_real: bool) -> Any:
    if abs(exponent) > 10**5:
        raise NoValue
    if is_real and base < 0 and exponent != mpmath.floor(exponent):
        # The real cube root of a negative number is negative.
        for root in (3, 5, 7):
            power = mpmath.nint(exponent * root)
            if abs(exponent * root - power) < _TOLERANCE:
                size = mpmath.power(-base, exponent)
                return -size if int(power) % 2 else size
        raise NoValue
    return mpmath.power(base, exponent)


def some_ratio(one: sympy.Basic, other: sympy.Basic) -> Any:
    """Returns the ratio of two expressions at some point as a rational number, or None if it is none."""
    is_real = not (one.has(sympy.I) or other.has(sympy.I))
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    with mpmath.workdps(DIGITS):
        for point in _points(names):
            try:
                x, y = _value(one, point, is_real), _value(other, point, is_real)
            except Unsupported:
                return None
            if x is None or y is None or x == 0 or y == 0 or isinstance(x / y, mpmath.mpc):
                continue
            ratio = sympy.nsimplify(sympy.Float(str(x / y), DIGITS), rational=True, tolerance=1e-15)
            return ratio if abs(x / y - mpmath.mpf(ratio.p) / ratio.q) < abs(x / y) * mpmath.mpf(10) ** -12 else None
    return None
