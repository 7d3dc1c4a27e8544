"""Comparison of the parts that have no parts of their own: numbers, expressions and matrices as LaTeX."""

from __future__ import annotations

import re
from fractions import Fraction

from .numbers import Number, same_number
from .parts import Expression, Matrix, Part

_CAPITALS = re.compile(r"[A-Z](?: ?[A-Z])+")
"""Points, sides or tosses of a coin, whose order matters."""


def same_leaves(gold: Part, answer: Part, scale: Fraction = Fraction(1)) -> bool:
    """Returns whether `answer` times `scale` equals `gold`. Only numbers, expressions and matrices can.

    Raises algebra.TooLarge if the comparison would take too long.
    """
    if isinstance(gold, Number) and isinstance(answer, Number):
        return same_number(gold, Number(answer.value * scale, answer.is_decimal))
    one, other = latex_of(gold), latex_of(answer)
    if one is None or other is None:
        return False
    words = [_CAPITALS.fullmatch(text) for text in (one, other)]
    if all(words):
        return scale == 1 and one.replace(" ", "") == other.replace(" ", "")
    # sympy takes a second to import; workers import it when they start.
    from .algebra import Unparsable, same_expression

    try:
        return same_expression(one, other, scale)
    except Unparsable:
        return _as_written(one) == _as_written(other) and scale == 1


def _as_written(latex: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", latex).replace(" ", "")


def latex_of(part: Part) -> str | None:
    """Returns a number, an expression or a matrix as LaTeX, and None for any other part."""
    if isinstance(part, Expression):
        return part.latex
    if isinstance(part, Number):
        over, under = part.value.numerator, part.value.denominator
        text = str(over) if under == 1 else rf"\frac{{{over}}}{{{under}}}"
        return rf"{text}\cdot 1.0" if part.is_decimal else text  # the factor marks a value that may be rounded
    if isinstance(part, Matrix):
        rows = [[latex_of(entry) for entry in row] for row in part.rows]
        if all(entry is not None for row in rows for entry in row):
            return r"\begin{pmatrix}" + r"\\".join("&".join(map(str, row)) for row in rows) + r"\end{pmatrix}"
    return None
