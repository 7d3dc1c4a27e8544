"""Comparison of lists, sets and tuples item by item."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from .numbers import Number
from .parts import Bracket, Chain, Expression, Part, Quantity
from .relations import Same, bare_values

LONGEST_WRITTEN_OUT = 1000
"""Terms that dots may stand for."""


def same_items(gold: Bracket, answer: Bracket, same: Same) -> bool:
    r"""Compares two lists, sets, tuples or intervals.

    In parentheses the order matters. A list without brackets may have any order, but every item counts; it equals a
    tuple of the same order, and a set with the same elements. A label that names each value (`a=1, b=2`) fixes the
    order of bare values, as does one whose values have different units (`3 apples, 4 pears`). `and` differs
    from `or` between relations, and `\land` from `\lor` between all items.
    """
    if _contradict(gold, answer):
        return False
    if not {gold.left, answer.left} <= {"", r"\{"}:
        return _same_tuple(gold, answer, same)
    named = bare_values(gold, by_name=False)
    if gold.left == "" and named != gold.items and not any(isinstance(item, Chain) for item in answer.items):
        return pairwise(named, answer.items, same)
    if (
        gold.left == ""
        and _differ_in_units(gold.items)
        and not any(isinstance(item, Quantity) for item in answer.items)
    ):
        return pairwise(gold.items, answer.items, same)
    one, other = with_dots(gold.items), with_dots(answer.items)
    if gold.left == answer.left == "":
        return _matched(one, other, same)
    return _covered(one, other, same) and _covered(other, one, lambda given, label: same(label, given))


def _differ_in_units(items: Sequence[Part]) -> bool:
    units = [item.unit for item in items if isinstance(item, Quantity)]
    return len(units) == len(items) and all(one != other for one, other in itertools.combinations(units, 2))


def _contradict(gold: Bracket, answer: Bracket) -> bool:
    """Returns whether one side says that all relations hold and the other that one of them does.

    The solutions `x=1 and x=2` are the solutions `x=1 or x=2`.
    """
    if "," in (gold.joint, answer.joint) or gold.is_either == answer.is_either:
        return False
    if not {gold.joint, answer.joint} <= {"and", "or"}:
        return True
    relations = [item for item in gold.items if isinstance(item, Chain)]
    names = {item.texts[0] for item in relations if item.signs == ("=",)}
    return bool(relations) and (len(names) != 1 or any(item.signs != ("=",) for item in relations))


def _same_tuple(gold: Bracket, answer: Bracket, same: Same) -> bool:
    if (gold.left, gold.right) == (answer.left, answer.right):
        return pairwise(gold.items, answer.items, same)
    listing, ordered = (gold, answer) if gold.left == "" else (answer, gold)
    if listing.left != "" or (ordered.left, ordered.right) != ("(", ")"):
        return False
    values = bare_values(listing, by_name=listing is answer)
    return pairwise(*((values, answer.items) if listing is gold else (gold.items, values)), same)


def pairwise(gold: Sequence[Part], answer: Sequence[Part], same: Same) -> bool:
    """Returns whether the items are equal in this order."""
    return len(gold) == len(answer) and all(same(a, b) for a, b in zip(gold, answer, strict=True))


def _matched(gold: Sequence[Part], answer: Sequence[Part], same: Same) -> bool:
    """Returns whether the items can be paired off, whatever their order."""
    if len(gold) != len(answer):
        return False
    remaining = list(answer)
    for item in gold:
        partner = next((index for index, other in enumerate(remaining) if same(item, other)), None)
        if partner is None:
            return False
        del remaining[partner]
    return True


def _covered(items: Sequence[Part], others: Sequence[Part], same: Same) -> bool:
    return all(any(same(item, other) for other in others) for item in items)


def with_dots(items: tuple[Part, ...]) -> tuple[Part, ...]:
    r"""Writes out `1,2,\dots,10`, if the terms before the dots are steps of one or at least three terms."""
    dots = [index for index, item in enumerate(items) if item == Expression(r"\dots")]
    if len(dots) != 1:
        return items
    before, after = (
        [item.value for item in part if isinstance(item, Number)] for part in (items[: dots[0]], items[dots[0] + 1 :])
    )
    steps = {b - a for a, b in itertools.pairwise(before)}
    is_clear = len(before) > 2 or steps == {Fraction(1)}
    if len(before) + len(after) + 1 != len(items) or len(after) != 1 or len(steps) != 1 or not is_clear or steps == {0}:
        return items
    step = steps.pop()
    count = (after[0] - before[-1]) / step
    if count.denominator != 1 or not 0 < count < LONGEST_WRITTEN_OUT:
        return items
    values = [*before, *(before[-1] + step * (index + 1) for index in range(int(count)))]
    return tuple(Number(value, False) for value in values)
