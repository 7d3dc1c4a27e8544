"""Comparison of the parts of a label with the parts of an answer. The label decides what an ambiguous notation means."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from .notations import Based, Clock, proportional
from .numbers import Number, same_number
from .parts import (
    Bracket, Builder, Chain, Expression, Guarded, Matrix, NamedSet, Operation, Part, Quantity, Ratio, Unreadable, Words,
)  # fmt: skip
from .relations import bare_values, same_builder, same_chain, value_of_chain
from .units import DEGREE, PERCENT, Unit


def same(gold: Part, answer: Part) -> bool:
    """Returns whether an answer equals a label. Raises algebra.TooLarge if the comparison would take too long."""
    if isinstance(gold, Unreadable) or isinstance(answer, Unreadable):
        return False
    if isinstance(gold, Guarded) or isinstance(answer, Guarded):
        return _same_guarded(gold, answer)
    if isinstance(gold, Quantity) or isinstance(answer, Quantity):
        return _same_quantity(gold, answer)
    if _same_structure(gold, answer):
        return True
    return _may_be_sets(gold, answer) and _same_sets(gold, answer)


def _same_structure(gold: Part, answer: Part) -> bool:
    if isinstance(gold, Chain) and isinstance(answer, Chain):
        return same_chain(gold, answer, same)
    if isinstance(gold, Chain) or isinstance(answer, Chain):
        return _same_as_chain(gold, answer)
    if isinstance(gold, Bracket) and isinstance(answer, Bracket):
        return _same_items(gold, answer)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return _same_rows(gold, answer)
    if isinstance(gold, Ratio | Clock) or isinstance(answer, Ratio | Clock):
        return _same_ratio(gold, answer)
    if isinstance(gold, Number) and isinstance(answer, Number):
        return same_number(gold, answer)
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold == answer
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _same_digits(gold, answer)
    if isinstance(gold, Builder) and isinstance(answer, Builder):
        return same_builder(gold, answer, same)
    if isinstance(gold, Operation) and isinstance(answer, Operation):
        return _same_operation(gold, answer)
    if isinstance(gold, Words | NamedSet) or isinstance(answer, Words | NamedSet):
        return _same_words(gold, answer)
    return _same_expressions(gold, answer, Fraction(1))


def _same_expressions(gold: Part, answer: Part, scale: Fraction) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        return same_number(gold, Number(answer.value * scale, answer.is_decimal))
    one, other = latex_of(gold), latex_of(answer)
    if one is None or other is None:
        return False
    from .algebra import Unparsable, same_expression  # sympy takes a second to import; workers import it when they start

    try:
        return same_expression(one, other, scale)
    except Unparsable:
        return one.replace(" ", "") == other.replace(" ", "") and scale == 1


def latex_of(part: Part) -> str | None:
    """Returns a number, an expression or a matrix as LaTeX, and None for any other part."""
    if isinstance(part, Expression):
        return part.latex
    if isinstance(part, Number):
        text = f"{part.value.numerator}" if part.value.denominator == 1 else rf"\frac{{{part.value.numerator}}}{{{part.value.denominator}}}"
        return f"{text}\\cdot 1.0" if part.is_decimal else text
    if isinstance(part, Matrix):
        rows = [[latex_of(entry) for entry in row] for row in part.rows]
        if all(entry is not None for row in rows for entry in row):
            return r"\begin{pmatrix}" + r"\\".join("&".join(map(str, row)) for row in rows) + r"\end{pmatrix}"
    return None


def _same_guarded(gold: Part, answer: Part) -> bool:
    conditions = [part.condition if isinstance(part, Guarded) else "" for part in (gold, answer)]
    parts = [part.part if isinstance(part, Guarded) else part for part in (gold, answer)]
    return conditions[0] == conditions[1] and same(*parts)


def _same_quantity(gold: Part, answer: Part) -> bool:
    """A unit may be missing on one side. If both sides have one, the quantities must agree."""
    if isinstance(gold, Chain) or isinstance(answer, Chain):
        return _same_as_chain(gold, answer)
    gold_unit, answer_unit = (part.unit if isinstance(part, Quantity) else None for part in (gold, answer))
    left, right = (part.value if isinstance(part, Quantity) else part for part in (gold, answer))
    if DEGREE in (gold_unit, answer_unit) and None in (gold_unit, answer_unit):
        left, right = (_in_radians(part, unit, other) for part, unit, other in ((left, gold_unit, right), (right, answer_unit, left)))
    scales = _scales(gold_unit, answer_unit)
    if 1 in scales and same(left, right):
        return True
    return any(_same_expressions(left, right, scale) for scale in scales if scale != 1)


def _in_radians(part: Part, unit: Unit | None, other: Part) -> Part:
    r"""Degrees become radians if the other side has no unit and contains \pi."""
    text = latex_of(part)
    if unit == DEGREE and isinstance(other, Expression) and r"\pi" in other.latex and text:
        return Expression(rf"\frac{{\pi}}{{180}}\cdot({text})")
    return part


def _scales(gold: Unit | None, answer: Unit | None) -> list[Fraction]:
    """Returns the factors by which the answer may be multiplied before the comparison. None fits contradictory units."""
    words = (answer.scale if answer else Fraction(1)) / (gold.scale if gold else Fraction(1))
    if gold and answer and gold.kinds and answer.kinds:
        if gold.kinds == answer.kinds:
            return [words * answer.factor / gold.factor]
        vague = any("unit" in unit.kinds for unit in (gold, answer))
        return [words] if vague and sorted(gold.kinds.values()) == sorted(answer.kinds.values()) else []
    if PERCENT in (gold, answer):
        return [Fraction(1), PERCENT.factor if answer == PERCENT else 1 / PERCENT.factor]
    return [words]


def _same_as_chain(gold: Part, answer: Part) -> bool:
    """Compares a relation with something that is none: `x=5` with 5, `x>3` with an interval."""
    chain, other = (gold, answer) if isinstance(gold, Chain) else (answer, gold)
    assert isinstance(chain, Chain)
    for value in value_of_chain(chain, same, is_label=chain is gold):
        if same(value, other) if chain is gold else same(other, value):
            return True
    return False


def _same_items(gold: Bracket, answer: Bracket) -> bool:
    is_open_set = {gold.left, answer.left} <= {"", r"\{"}
    if not is_open_set:
        if gold.left == answer.left and gold.right == answer.right:
            return _pairwise(gold.items, answer.items)
        unordered, ordered = (gold, answer) if gold.left == "" else (answer, gold)
        if unordered.left != "" or ordered.left != "(" or ordered.right != ")":
            return False
        values = bare_values(unordered, by_name=unordered is answer)
        return _pairwise(values, ordered.items) if unordered is gold else _pairwise(ordered.items, values)
    if gold.left == "" and bare_values(gold, by_name=False) != gold.items and not any(isinstance(i, Chain) for i in answer.items):
        return _pairwise(bare_values(gold, by_name=False), answer.items)  # the label names each value, so the order matters
    if gold.left == answer.left == "":
        return _matched(with_dots(gold.items), with_dots(answer.items), same)
    one, other = with_dots(gold.items), with_dots(answer.items)
    return _covered(one, other, same) and _covered(other, one, lambda b, a: same(a, b))


def with_dots(items: tuple[Part, ...]) -> tuple[Part, ...]:
    r"""Writes out `1,2,\dots,10`, if the terms before the dots are steps of one, or at least three steps of one size."""
    dots = [index for index, item in enumerate(items) if item == Expression(r"\dots")]
    if len(dots) != 1 or not all(isinstance(item, Number) for item in (*items[: dots[0]], *items[dots[0] + 1 :])):
        return items
    before = [item.value for item in items[: dots[0]] if isinstance(item, Number)]
    after = [item.value for item in items[dots[0] + 1 :] if isinstance(item, Number)]
    steps = {b - a for a, b in zip(before, before[1:], strict=False)}
    if len(after) != 1 or len(steps) != 1 or (len(before) < 3 and steps != {Fraction(1)}):
        return items
    step = steps.pop()
    count = (after[0] - before[-1]) / step if step else Fraction(-1)
    if count.denominator != 1 or not 0 < count < 1000:
        return items
    values = [*before, *(before[-1] + step * (index + 1) for index in range(int(count)))]
    return tuple(Number(value, False) for value in values)


def _pairwise(gold: Sequence[Part], answer: Sequence[Part]) -> bool:
    return len(gold) == len(answer) and all(same(a, b) for a, b in zip(gold, answer, strict=True))


def _matched(gold: Sequence[Part], answer: Sequence[Part], equal: Callable[[Part, Part], bool]) -> bool:
    """Returns whether the items can be paired off, whatever their order."""
    if len(gold) != len(answer):
        return False
    remaining = list(answer)
    for item in gold:
        partner = next((index for index, other in enumerate(remaining) if equal(item, other)), None)
        if partner is None:
            return False
        del remaining[partner]
    return True


def _covered(items: Sequence[Part], others: Sequence[Part], equal: Callable[[Part, Part], bool]) -> bool:
    return all(any(equal(item, other) for other in others) for item in items)


def _same_rows(gold: Matrix, answer: Matrix) -> bool:
    return len(gold.rows) == len(answer.rows) and all(map(_pairwise, gold.rows, answer.rows))


def _same_ratio(gold: Part, answer: Part) -> bool:
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return gold.equals(answer)
    for clock, other_part in ((gold, answer), (answer, gold)):
        if isinstance(clock, Clock) and isinstance(other_part, Number):
            if clock.half and clock.numbers == (other_part.value,):
                return True  # `9` for `9 a.m.`
    one, other = _terms(gold), _terms(answer)
    if one is None or other is None:
        return False
    if isinstance(gold, Clock):
        return list(one) == list(other)
    numbers = [[term.value for term in terms if isinstance(term, Number)] for terms in (one, other)]
    if len(numbers[0]) == len(one) and len(numbers[1]) == len(other):
        return proportional(*numbers)
    return len(one) == len(other) and all(_same_cross(a, b, one[0], other[0]) for a, b in zip(one, other, strict=True))


def _same_cross(a: Part, b: Part, first: Part, other_first: Part) -> bool:
    """Returns whether a : first = b : other_first."""
    texts = [latex_of(part) for part in (a, other_first, b, first)]
    if None in texts:
        return same(a, b) and same(first, other_first)
    left, right = (Expression(rf"({texts[index]})\cdot({texts[index + 1]})") for index in (0, 2))
    return _same_expressions(left, right, Fraction(1))


def _terms(part: Part) -> tuple[Part, ...] | None:
    if isinstance(part, Ratio):
        return part.terms
    if isinstance(part, Clock) and part.half is None:
        return tuple(Number(Fraction(number), False) for number in part.numbers)
    if isinstance(part, Number):
        return (Number(Fraction(part.value.numerator), False), Number(Fraction(part.value.denominator), False))
    return None


def _same_digits(gold: Part, answer: Part) -> bool:
    """The base may be missing on one side."""
    based, other = (gold, answer) if isinstance(gold, Based) else (answer, gold)
    assert isinstance(based, Based)
    if not isinstance(other, Number) or other.is_decimal != ("." in based.digits):
        return False
    try:
        return Fraction(based.digits) == other.value
    except ValueError:
        return False


def _same_operation(gold: Operation, answer: Operation) -> bool:
    if gold.sign != answer.sign:
        return False
    if same(gold.left, answer.left) and same(gold.right, answer.right):
        return True
    return gold.sign != r"\setminus" and same(gold.left, answer.right) and same(gold.right, answer.left)


def _same_words(gold: Part, answer: Part) -> bool:
    if isinstance(gold, NamedSet) or isinstance(answer, NamedSet):
        return gold == answer
    words, other = (gold, answer) if isinstance(gold, Words) else (answer, gold)
    assert isinstance(words, Words)
    if isinstance(other, Words):
        return words.text.replace(" ", "") == other.text.replace(" ", "")
    # `C` is a choice on one side and a variable on the other.
    return isinstance(other, Expression) and re.sub(r"\\text|[{} ]", "", other.latex) == words.text.replace(" ", "")


def _may_be_sets(gold: Part, answer: Part) -> bool:
    return all(isinstance(part, Bracket | Operation | NamedSet | Builder | Chain) for part in (gold, answer))


def _same_sets(gold: Part, answer: Part) -> bool:
    from .sets import same_sets  # imports sympy

    return same_sets(gold, answer)
