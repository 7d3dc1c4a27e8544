"""Comparison of values with units, and of ratios and clock times."""

from __future__ import annotations

import re
from fractions import Fraction

from .leaves import latex_of, same_leaves
from .notations import Clock, proportional
from .numbers import Number
from .parts import Expression, Part, Quantity, Ratio
from .reader import read
from .relations import Same
from .units import DEGREE, PERCENT, RADIAN, Unit

_INFINITE = re.compile(r"\\(?:infty|lim)(?![a-zA-Z])")
_UNSPACED = re.compile(r"^([\d.]+)([a-zA-Z]+)$")


def same_quantity(gold: Part, answer: Part, same: Same) -> bool:
    """Compares values with units. A unit may be missing on one side; if both have one, the quantities must agree.

    Nothing scales infinity: the answer may omit the label's unit of it, but neither a percent sign nor `million`, and
    may name no other unit.
    """
    if isinstance(gold, Quantity) and isinstance(answer, Expression):
        answer = read(_UNSPACED.sub(r"\1 \2", answer.latex))  # the label says that the letters are a unit
    gold_unit, answer_unit = (part.unit if isinstance(part, Quantity) else None for part in (gold, answer))
    left, right = (part.value if isinstance(part, Quantity) else part for part in (gold, answer))
    if gold_unit != answer_unit and any(_INFINITE.search(latex_of(part) or "") for part in (left, right)):
        may_be_omitted = gold_unit is not None and gold_unit != PERCENT and gold_unit.scale == 1
        return answer_unit is None and may_be_omitted and same(left, right)
    has_radians = RADIAN in (gold_unit, answer_unit)
    if DEGREE in (gold_unit, answer_unit) and (has_radians or None in (gold_unit, answer_unit)):
        left, right = (
            _in_radians(part, unit, other, has_radians)
            for part, unit, other in ((left, gold_unit, right), (right, answer_unit, left))
        )
        if has_radians:
            return same(left, right)
    scales = _scales(gold_unit, answer_unit)
    if 1 in scales and same(left, right):
        return True
    return any(same_leaves(left, right, scale) for scale in scales if scale != 1)


def _in_radians(part: Part, unit: Unit | None, other: Part, to_radians: bool) -> Part:
    r"""Degrees become radians if the other side is in radians, or has no unit and contains \pi."""
    text = latex_of(part)
    if unit == DEGREE and text and (to_radians or (isinstance(other, Expression) and r"\pi" in other.latex)):
        return Expression(rf"\frac{{\pi}}{{180}}\cdot({text})")
    return part


def _scales(gold: Unit | None, answer: Unit | None) -> list[Fraction]:
    """Returns the factors by which the answer may be multiplied before the comparison, none for contradictory units."""
    words = (answer.scale if answer else Fraction(1)) / (gold.scale if gold else Fraction(1))
    if gold and answer and gold.kinds and answer.kinds:
        if gold.kinds == answer.kinds:
            return [words * answer.factor / gold.factor]
        vague = any("unit" in unit.kinds for unit in (gold, answer))
        return [words] if vague and sorted(gold.kinds.values()) == sorted(answer.kinds.values()) else []
    if PERCENT in (gold, answer):
        return [Fraction(1), PERCENT.factor if answer == PERCENT else 1 / PERCENT.factor]
    return [words]


def same_ratio(gold: Part, answer: Part, same: Same) -> bool:
    """Compares ratios and clock times. The label decides whether `9:20` is a time.

    A ratio may be written as a fraction, but equals no other number, and neither does a time.
    """
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return gold.equals(answer)
    one, two = _terms(gold), _terms(answer)
    if one is None or two is None:
        return False
    if isinstance(gold, Clock):
        return list(one) == list(two)
    numbers = [[term.value for term in terms if isinstance(term, Number)] for terms in (one, two)]
    if len(numbers[0]) == len(one) and len(numbers[1]) == len(two):
        return proportional(*numbers)
    return len(one) == len(two) and all(_same_cross(a, b, one[0], two[0], same) for a, b in zip(one, two, strict=True))


def _same_cross(a: Part, b: Part, first: Part, other_first: Part, same: Same) -> bool:
    """Returns whether a : first = b : other_first."""
    texts = [latex_of(part) for part in (a, other_first, b, first)]
    if None in texts:
        return same(a, b) and same(first, other_first)
    left, right = (Expression(rf"({texts[index]})\cdot({texts[index + 1]})") for index in (0, 2))
    return same_leaves(left, right)


def _terms(part: Part) -> tuple[Part, ...] | None:
    if isinstance(part, Ratio):
        return part.terms
    if isinstance(part, Clock) and part.half is None and min(part.numbers[1:]) > 9:  # 9:05 can only be a time
        return tuple(Number(Fraction(number), False) for number in part.numbers)
    if isinstance(part, Number) and part.is_fraction:
        return (Number(Fraction(part.value.numerator), False), Number(Fraction(part.value.denominator), False))
    return None
