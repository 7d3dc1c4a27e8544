r"""Sets as sympy sees them: intervals, unions, differences, and the solutions of inequalities in one variable."""

from __future__ import annotations

import re
from functools import reduce
from typing import Any

import sympy

from .algebra import Unparsable, exact, read
from .items import with_dots
from .leaves import latex_of
from .numbers import Number
from .parts import Bracket, Builder, Chain, Expression, NamedSet, Operation, Part

_NAMED = {
    "R": sympy.S.Reals,
    "Z": sympy.S.Integers,
    "Q": sympy.S.Rationals,
    "N": sympy.S.Naturals,
    "C": sympy.S.Complexes,
}
_OPERATIONS = {r"\cup": sympy.Union, r"\cap": sympy.Intersection, r"\setminus": sympy.Complement}
_RELATIONS = {"<": sympy.Lt, ">": sympy.Gt, r"\le": sympy.Le, r"\ge": sympy.Ge, "=": sympy.Eq, r"\ne": sympy.Ne}
_VARIABLE = sympy.Symbol("variable", real=True)


class NoSet(ValueError):
    """A part that is no set of numbers."""


def same_sets(gold: Part, answer: Part) -> bool:
    """Returns whether both parts are sets of numbers, or conditions on one variable, and the sets are equal."""
    if _variables(gold) and _variables(answer) and _variables(gold) != _variables(answer):
        return False
    if all(isinstance(part, Bracket) for part in (gold, answer)) and not any(
        _variables(part) for part in (gold, answer)
    ):
        return False  # brackets have been compared item by item
    try:
        one, other = _set(gold), _set(answer)
    except (NoSet, Unparsable, NotImplementedError):
        return False
    return bool(one == other or _is_empty(sympy.SymmetricDifference(one, other)))


def _is_empty(difference: sympy.Set) -> bool:
    return difference.is_empty is True


def _variables(part: Part) -> set[str]:
    """Returns the variables of free-standing conditions. A set builder binds its variable."""
    if isinstance(part, Chain):
        return {name for text in part.texts for name in _letters(text)}
    if isinstance(part, Bracket) and part.left == "":
        return {name for item in part.items for name in _variables(item)}
    return set()


def _letters(text: str) -> list[str]:
    return re.findall(r"(?<![a-zA-Z\\])[a-df-zA-Z](?:_\{[^{}]*\})?", text)


def _set(part: Part) -> sympy.Set:
    if isinstance(part, NamedSet):
        return _NAMED[part.name]
    if isinstance(part, Operation):
        return _OPERATIONS[part.sign](_set(part.left), _set(part.right))
    if isinstance(part, Chain) and part.signs != ("=",):
        return _solutions(part, None)
    if isinstance(part, Builder):
        return _built(part)
    if not isinstance(part, Bracket):
        raise NoSet
    if part.left == r"\{":
        return sympy.FiniteSet(*(_number(item) for item in with_dots(part.items)))
    if part.left in ("(", "[") and part.right in (")", "]") and len(part.items) == 2:
        start, end = map(_number, part.items)
        return sympy.Interval(start, end, left_open=part.left == "(", right_open=part.right == ")")
    if (
        part.left == ""
        and part.joint != ","
        and all(isinstance(item, Chain) for item in part.items)
        and len(_variables(part)) == 1
    ):
        join = sympy.Union if part.is_either else sympy.Intersection
        return join(*(_solutions(item, None) for item in part.items if isinstance(item, Chain)))
    raise NoSet


def _built(part: Builder) -> sympy.Set:
    if not re.fullmatch(r"[a-zA-Z]", part.head):
        raise NoSet
    conditions = part.conditions.items if isinstance(part.conditions, Bracket) else (part.conditions,)
    found = [_solutions(item, part.head) for item in conditions if isinstance(item, Chain)]
    if len(found) != len(conditions):
        raise NoSet
    is_either = isinstance(part.conditions, Bracket) and part.conditions.is_either
    solutions = reduce(sympy.Union if is_either else sympy.Intersection, found)
    return sympy.Intersection(solutions, _set(part.domain) if part.domain else sympy.S.Reals)


def _solutions(chain: Chain, variable: str | None) -> sympy.Set:
    """Returns the real numbers that satisfy a relation in one variable."""
    names = _variables(chain)
    if "=" in chain.signs and (len(chain.signs) > 1 or not re.fullmatch(r"[a-zA-Z]", chain.texts[0])):
        raise NoSet  # equations are compared as they stand, not by their solutions
    if len(names) != 1 or (variable and names != {variable}) or not set(chain.signs) <= set(_RELATIONS):
        raise NoSet
    sides = [read(latex) for side in chain.sides if (latex := latex_of(side)) is not None]
    symbols = {symbol for side in sides for symbol in side.free_symbols}
    if len(sides) != len(chain.sides) or len(symbols) != 1:
        raise NoSet
    plain = [exact(side).xreplace(dict.fromkeys(symbols, _VARIABLE)) for side in sides]
    found = []
    for left, sign, right in zip(plain, chain.signs, plain[1:], strict=False):
        relation = _RELATIONS[sign](left, right)
        found.append(sympy.S.Reals if relation is sympy.true else sympy.S.EmptySet if relation is sympy.false else
                     sympy.solveset(relation, _VARIABLE, sympy.S.Reals))  # fmt: skip
    solutions = reduce(sympy.Intersection, found)
    if solutions.has(sympy.ConditionSet):
        raise NoSet
    return solutions


def _number(part: Part) -> Any:
    if not isinstance(part, Number | Expression) or (latex := latex_of(part)) is None:
        raise NoSet
    value = exact(read(latex)).doit()
    if value.free_symbols or not (value.is_real or value.is_infinite):
        raise NoSet
    return value
