"""Relations: equations, inequalities, congruences, and the values that they state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from .leaves import latex_of
from .names import GREEK
from .numbers import Number
from .parts import Bracket, Builder, Chain, Expression, Matrix, NamedSet, Part
from .reader import read

Same = Callable[[Part, Part], bool]
FLIPPED = {
    "<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne", r"\approx": r"\approx",
    r"\equiv": r"\equiv", r"\sim": r"\sim", r"\cong": r"\cong", r"\parallel": r"\parallel", r"\perp": r"\perp",
    r"\ll": r"\gg", r"\gg": r"\ll",
}  # fmt: skip
_NUMERIC = ("=", "<", ">", r"\le", r"\ge", r"\ne")
_MODULUS = re.compile(r"\(?\\(?:pmod|mod|text\{ ?\(?mod)\s*\{?(?P<modulus>[^{}()]+)\}?\)?\}?\)?$")
_NAME = re.compile(
    r"(?:\\text\{[^{}]*\}|\\(?:angle|triangle|overline|vec|hat|bar|mathcal|mathbb|dot|ddot|tilde|overrightarrow)\s*|\\[a-zA-Z]+|[a-zA-Z]|"
    r"[_^']?\{[a-zA-Z0-9, \\+]*\}|_\w|['|]|\\max|\\min|\s|[(\[](?:[a-zA-Z0-9_,{}\\ '.+=<>|-]|\\[a-zA-Z]+)*[)\]])+"
)
_QUOTIENT = re.compile(
    r"\\frac\{(?P<over>[^{}]+|[^{}]*_\{[^{}]*\}[^{}]*)\}\{(?P<under>[^{}]+|[^{}]*_\{[^{}]*\}[^{}]*)\}|(?P<one>[^/]+)/(?P<other>[^/]+)"
)
_DERIVATIVE = re.compile(
    r"\\frac\{(?:d|\\partial)(?:\^\{\d\})? ?\\?[a-zA-Z]*\}\{(?:(?:d|\\partial) ?\\?[a-zA-Z]+(?:\^\{\d\})? ?)+\}"
)
_BINDS = re.compile(r"\\(?:lim|sum|prod|int)(?![a-zA-Z])")
_OPERATORS = re.compile(
    r"\\(?:sqrt|frac|log|ln|sin|cos|tan|pi|sum|int|prod|cdot|times|binom|infty|pm|mod|pmod|exp|cup)(?![a-zA-Z])"
)


def is_name(text: str) -> bool:
    r"""Returns whether a text names something, as x, f(x), `\angle ABC`, `v_{max}` and a quotient of names do."""
    if _DERIVATIVE.fullmatch(text):
        return True
    if match := _QUOTIENT.fullmatch(text):
        return all(is_name(side) for side in match.groups() if side)
    text = text.replace("^{-1}", "")
    head = re.sub(r"_\{[^{}]*\}|\([^()]*\)|\[[^\[\]]*\]", "", text)
    if "^" in head or re.search(r"\d", head) or _OPERATORS.search(head):
        return False
    return _NAME.fullmatch(text) is not None and re.search(r"[a-zA-Z]", text) is not None


def value_of_chain(chain: Chain, same: Same, is_label: bool) -> Iterator[Part]:
    r"""Yields the values that a chain of equations states: `x=5` and `x=2+3=5` state 5, and `\log_2(32)=5` does.

    An answer states its value only if its first side is a name or all sides are equal: `34=35` states nothing. `x+y=5`
    and `x^2=4` state no value, nor does `x=y=5`, because a value of one name says only half of this.
    """
    signs = set(chain.signs)
    if not signs <= {"=", r"\approx"}:
        return
    sides, texts = list(chain.sides), list(chain.texts)
    if len(texts) == 2 and is_name(texts[1]) and not is_name(texts[0]):
        sides, texts = sides[::-1], texts[::-1]  # `5=x` states 5
    if not is_label and _has_other_argument(texts):
        return
    if is_name(texts[0]) or _is_tuple_of_names(texts[0]):
        sides, texts, links = sides[1:], texts[1:], list(chain.signs[1:])
    else:
        if any(_has_names(text) for text in texts if not _BINDS.match(text)):
            return
        links = list(chain.signs)
        if len({text.replace(" ", "") for text in texts}) < len(texts):
            return
    if _has_other_unknowns(texts[-len(chain.signs) :]):
        return
    exact = [index for index, sign in enumerate(links) if sign == "="]
    if not is_label and not all(same(sides[index], sides[index + 1]) for index in exact):
        return
    if r"\approx" in links:
        first = links.index(r"\approx")
        yield sides[first]
        if is_label:
            yield sides[first + 1]
        return
    yield sides[-1]


def _letters(text: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", text)))


def _has_other_unknowns(texts: list[str]) -> bool:
    r"""Returns whether a side between the first and the last one names what the last does not, as in `x=2y=6`.

    The texts are all sides but the first.
    """
    *computations, last = map(_unknowns, texts)
    return any(not names <= last for names in computations)


def _unknowns(text: str) -> set[str]:
    if _BINDS.match(text):
        return set()
    text = re.sub(r"(?<=\d) ?\\text\{[^{}]*\}", "", text)  # the unit of a number
    greek = re.findall(rf"\\(?:{GREEK})(?![a-zA-Z])", text)
    return {*_letters(re.sub(r"_\{[^{}]*\}", "", text)), *greek} - {"e", "i", r"\pi"}


def _has_other_argument(texts: list[str]) -> bool:
    """Returns whether `f(y)=2x+3` speaks of another variable than its argument."""
    call = re.fullmatch(r"\\?[a-zA-Z]+'*\(([a-zA-Z])\)", texts[0])
    if call is None:
        return False
    letters = set(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z]|(?<=\d)[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", texts[-1])))
    return call[1] not in letters and not letters.isdisjoint("txyz")


def _is_tuple_of_names(text: str) -> bool:
    inside = text[1:-1] if text.startswith("(") and text.endswith(")") else ""
    return bool(inside) and all(is_name(part.strip()) for part in inside.split(","))


def _has_names(text: str) -> bool:
    return (
        re.search(
            r"(?<![a-zA-Z\\])[a-df-zA-Z](?![a-zA-Z])|(?<![a-zA-Z\\])[a-zA-Z]{2,}", re.sub(r"\\[a-zA-Z]+", " ", text)
        )
        is not None
    )


def bare_values(listing: Bracket, by_name: bool) -> tuple[Part, ...]:
    """Returns the values of `x=2, y=3` in the order in which they stand or in that of their names.

    The items are returned as they are if they are not assignments to different names.
    """
    names, values = [], []
    for item in listing.items:
        if not isinstance(item, Chain) or item.signs != ("=",) or not is_name(item.texts[0]):
            return listing.items
        names.append(item.texts[0])
        values.append(item.sides[1])
    if len(set(names)) < len(names):
        return listing.items
    order = sorted(range(len(names)), key=names.__getitem__) if by_name else range(len(names))
    return tuple(values[index] for index in order)


def same_chain(gold: Chain, answer: Chain, same: Same) -> bool:
    """Returns whether two relations say the same: side by side in either direction, or as multiples of one another."""
    answer = _with_arguments_of(gold, answer)
    if bool(_unknowns(" ".join(gold.texts))) != bool(_unknowns(" ".join(answer.texts))):
        return False  # `\sin^2x+\cos^2x=1` says more than `1=1`
    for chain in (answer, _reversed(answer)):
        if chain is not None and chain.signs == gold.signs and _same_sides(gold, chain, same):
            return True
    if (
        set(gold.signs) <= {"=", r"\approx"}
        and set(answer.signs) <= {"=", r"\approx"}
        and (len(gold.signs) > 1 or len(answer.signs) > 1)
    ):
        return _same_final(gold, answer, same)
    if len(gold.signs) != 1 or len(answer.signs) != 1:
        return False
    if gold.signs == answer.signs == (r"\equiv",):
        return _same_congruence(gold, answer, same)
    if not {*gold.signs, *answer.signs} <= set(_NUMERIC):
        return False
    return _are_multiples(gold, answer)


def equations(chain: Chain) -> Bracket | None:
    """Returns the equations `x=2, y=2` that `x=y=2` states, each with the last side, or None for any other chain."""
    if len(chain.signs) < 2 or set(chain.signs) != {"="}:
        return None
    sides, texts = chain.sides, chain.texts
    if _unknowns(texts[-1]) and not _unknowns(texts[0]):
        sides, texts = sides[::-1], texts[::-1]
    pairs = zip(sides[:-1], texts[:-1], strict=True)
    items = tuple(Chain((side, sides[-1]), ("=",), (text, texts[-1])) for side, text in pairs)
    return Bracket("", "", items, "and")


def _with_arguments_of(gold: Chain, answer: Chain) -> Chain:
    """Renames the variable of `f(t)=t^2` to that of the label's `f(x)=x^2`.

    The letter of `P(A)=0.3` or of `f(a)=b` is no such variable: the value does not depend on it.
    """
    calls = [re.fullmatch(r"(\\?[a-zA-Z]+'*)\(([a-zA-Z])\)", chain.texts[0]) for chain in (gold, answer)]
    if not calls[0] or not calls[1] or calls[0][1] != calls[1][1]:
        return answer
    old, new = calls[1][2], calls[0][2]
    golds, answers = (_letters("".join(chain.texts[1:])) for chain in (gold, answer))
    if new in golds and old in answers and new not in answers:
        changed = renamed(answer, old, new)
        assert isinstance(changed, Chain)
        return changed
    return answer


def _same_sides(gold: Chain, answer: Chain, same: Same) -> bool:
    pairs = zip(gold.sides, answer.sides, gold.texts, answer.texts, strict=True)
    return all(one.replace(" ", "") == other.replace(" ", "") or same(a, b) for a, b, one, other in pairs)


def _reversed(chain: Chain) -> Chain | None:
    if not all(sign in FLIPPED for sign in chain.signs):
        return None
    signs = tuple(FLIPPED[sign] for sign in reversed(chain.signs))
    return Chain(chain.sides[::-1], signs, chain.texts[::-1])


def _same_final(gold: Chain, answer: Chain, same: Same) -> bool:
    """Compares `x=2+3=5` with `x=5`: the same name, the same value at the end, and only computations between them."""
    if gold.texts[0].replace(" ", "") != answer.texts[0].replace(" ", "") or not is_name(gold.texts[0]):
        return False
    golds, answers = list(value_of_chain(gold, same, is_label=True)), list(value_of_chain(answer, same, is_label=False))
    return bool(golds and answers) and any(same(one, answers[0]) for one in golds)


def _same_congruence(gold: Chain, answer: Chain, same: Same) -> bool:
    found = [_MODULUS.search(chain.texts[1]) for chain in (gold, answer)]
    if not all(found) or gold.texts[0] != answer.texts[0]:
        return False
    moduli = [match["modulus"].strip() for match in found if match]
    residues = [
        chain.texts[1][: match.start()].strip(" (") for chain, match in zip((gold, answer), found, strict=True) if match
    ]
    if moduli[0] != moduli[1]:
        return False
    if all(text.lstrip("-").isdigit() for text in (*residues, moduli[0])):
        return int(moduli[0]) > 0 and (int(residues[0]) - int(residues[1])) % int(moduli[0]) == 0
    return same(Expression(residues[0]), Expression(residues[1]))


def _are_multiples(gold: Chain, answer: Chain) -> bool:
    """Returns whether `left - right` of one relation is a constant multiple of that of the other."""
    differences = [_difference(chain) for chain in (gold, answer)]
    if any(difference is None for difference in differences):
        return False
    one, other = differences
    if not one.free_symbols or one.free_symbols != other.free_symbols:
        return False
    factor = _constant_ratio(one, other)
    if factor is None or factor == 0:
        return False
    sign = answer.signs[0] if factor > 0 else FLIPPED[answer.signs[0]]
    return sign == gold.signs[0]


def _difference(chain: Chain) -> Any:
    from .algebra import Unparsable
    from .algebra import read as parse

    sides = [latex_of(side) if isinstance(side, Expression | Number | Matrix) else None for side in chain.sides]
    if None in sides:
        return None
    try:
        left, right = (parse(str(side)) for side in sides)
    except Unparsable:
        return None
    return None if left.is_Matrix or right.is_Matrix else left - right


def _constant_ratio(one: Any, other: Any) -> Any:
    """Returns the number c with one = c * other, or None."""
    from .points import same_at_points, some_ratio

    ratio = some_ratio(one, other)
    return ratio if ratio is not None and same_at_points(one, ratio * other) else None


def same_builder(gold: Builder, answer: Builder, same: Same) -> bool:
    """Compares two sets by their conditions, whatever the bound variable is called. The usual domain is R."""
    reals = NamedSet("R")
    if not same(gold.domain or reals, answer.domain or reals):
        return False
    conditions = answer.conditions
    if gold.head != answer.head:
        names = [
            set(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", re.sub(r"(?<=\d)(?=[a-zA-Z])", " ", head)))
            for head in (gold.head, answer.head)
        ]
        if len(names[0]) != 1 or len(names[1]) != 1:
            return False
        old, new = names[1].pop(), names[0].pop()
        if re.sub(rf"(?<![a-zA-Z\\]){old}(?![a-zA-Z])", new, answer.head) != gold.head:
            return False
        conditions = renamed(conditions, old, new)
    joints = [part.is_either for part in (gold.conditions, conditions) if isinstance(part, Bracket)]
    return len(set(joints)) < 2 and same(gold.conditions, conditions)


def renamed(part: Part, old: str, new: str) -> Part:
    """Returns the relations with another name for a variable."""
    if isinstance(part, Chain):
        texts = tuple(re.sub(rf"(?<![a-zA-Z\\]){old}(?![a-zA-Z])", new, text) for text in part.texts)
        return Chain(tuple(read(text) for text in texts), part.signs, texts)
    if isinstance(part, Bracket):
        return Bracket(part.left, part.right, tuple(renamed(item, old, new) for item in part.items), part.joint)
    return part
