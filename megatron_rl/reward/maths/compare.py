"""Comparison of a label's parts with an answer's parts. The label decides what an ambiguous notation means."""

from __future__ import annotations

import re
from fractions import Fraction

from .items import pairwise, same_items
from .leaves import same_leaves
from .notations import Based, Clock
from .numbers import Number
from .parts import (
    Bracket,
    Builder,
    Chain,
    Expression,
    Guarded,
    Matrix,
    NamedSet,
    Operation,
    Part,
    Quantity,
    Ratio,
    Unreadable,
    Words,
)  # fmt: skip
from .quantities import same_quantity, same_ratio
from .relations import equations, same_builder, same_chain, value_of_chain


def same(gold: Part, answer: Part) -> bool:
    """Returns whether an answer equals a label. Raises algebra.TooLarge if the comparison would take too long."""
    if isinstance(gold, Unreadable) or isinstance(answer, Unreadable):
        return False
    if isinstance(gold, Guarded) or isinstance(answer, Guarded):
        return _same_guarded(gold, answer)
    if isinstance(gold, Chain) != isinstance(answer, Chain) and _same_as_chain(gold, answer):
        return True
    if isinstance(gold, Quantity) or isinstance(answer, Quantity):
        return (
            same_quantity(gold, answer, same)
            if not isinstance(gold, Chain) and not isinstance(answer, Chain)
            else False
        )
    if _same_structure(gold, answer):
        return True
    return all(isinstance(part, Bracket | Operation | NamedSet | Builder | Chain) for part in (gold, answer)) and (
        _same_sets(gold, answer)
    )


def _same_structure(gold: Part, answer: Part) -> bool:
    if isinstance(gold, Chain) and isinstance(answer, Chain):
        return same_chain(gold, answer, same)
    if isinstance(gold, Bracket) and isinstance(answer, Bracket):
        return same_items(gold, answer, same)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        rows = zip(gold.rows, answer.rows, strict=False)
        return len(gold.rows) == len(answer.rows) and all(pairwise(one, other, same) for one, other in rows)
    if isinstance(gold, Ratio | Clock) or isinstance(answer, Ratio | Clock):
        return same_ratio(gold, answer, same)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _same_digits(gold, answer)
    if isinstance(gold, Builder) and isinstance(answer, Builder):
        return same_builder(gold, answer, same)
    if isinstance(gold, Operation) and isinstance(answer, Operation):
        return _same_operation(gold, answer)
    if isinstance(gold, Words | NamedSet) or isinstance(answer, Words | NamedSet):
        return _same_words(gold, answer)
    return same_leaves(gold, answer)


def _same_guarded(gold: Part, answer: Part) -> bool:
    conditions = [part.condition if isinstance(part, Guarded) else "" for part in (gold, answer)]
    parts = [part.part if isinstance(part, Guarded) else part for part in (gold, answer)]
    return conditions[0] == conditions[1] and same(*parts)


def _same_as_chain(gold: Part, answer: Part) -> bool:
    """Compares a relation with something that is none: `x=5` with the value 5 that it states, `x=y=2` with a list."""
    chain, other = (gold, answer) if isinstance(gold, Chain) else (answer, gold)
    assert isinstance(chain, Chain)
    if _is_list_of_equations(other) and (stated := equations(chain)) is not None:
        return same(*((stated, other) if chain is gold else (other, stated)))
    if isinstance(gold, Chain):
        return any(same(value, answer) for value in value_of_chain(gold, same, is_label=True))
    assert isinstance(answer, Chain)
    return any(same(gold, value) for value in value_of_chain(answer, same, is_label=False))


def _is_list_of_equations(part: Part) -> bool:
    if not isinstance(part, Bracket) or part.left != "":
        return False
    return all(isinstance(item, Chain) and item.signs == ("=",) for item in part.items)


def _same_digits(gold: Part, answer: Part) -> bool:
    """Compares numbers in a named base digit by digit. The answer may omit the base of the label."""
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold == answer
    if not isinstance(gold, Based) or not isinstance(answer, Number) or answer.is_decimal != ("." in gold.digits):
        return False
    return not re.search(r"[a-z]", gold.digits) and Fraction(gold.digits) == answer.value


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


def _same_sets(gold: Part, answer: Part) -> bool:
    from .sets import same_sets  # imports sympy

    return same_sets(gold, answer)
