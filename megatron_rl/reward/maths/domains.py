r"""Domains of variables: `k\in\mathbb{Z}` behind an answer, `\mathbb{R}` before a relation, half of the real line."""

from __future__ import annotations

import re
from fractions import Fraction

from .numbers import Number
from .parts import Bracket, Expression
from .scan import balanced

_IN = r"(?P<name>[a-zA-Z]) ?\\in ?\\mathbb"
_LAST = re.compile(
    rf"(?P<head>.+?)(?:[,;] ?| ?(?P<open>\())(?P<condition>{_IN}\{{[RZQNC]\}}(?:\^\{{\+\}})?)(?(open)\))"
)
_FIRST = re.compile(rf"{_IN}\{{R\}}(?:,| ?\\text\{{,? ?(?:and|with) ?\}}) ?(?P<rest>.+)")
_OPENING = re.compile(r"^(?:for|where|with|when|if)(?: (?:all|any|every|some))? ")
_INTEGER = re.compile(r"(?:(?:any|every|all|some) )?(?:integers? ([a-z])|([a-z]) (?:is (?:an|any) |an )integer)")
_MEMBERSHIP = re.compile(r"[a-z]\\in\\mathbb\{[zqnc]\}(?:\^\{\+\})?")
_HALF_LINE = re.compile(r"\\mathbb\{R\}(?:\^\{(?P<sign>[+-])\}|_\{(?P<bound><|>|\\le|\\ge)0\})")


def split_domain(text: str) -> tuple[str, str] | None:
    r"""Separates `k\pi, k\in\mathbb{Z}` or `k\pi(k\in\mathbb{Z})` into the answer and the condition in lower case.

    The condition is empty for the reals, which are the usual domain. Returns None if the answer does not depend on the
    variable.
    """
    match = _LAST.fullmatch(text)
    if match is None or not _mentions(match["head"], match["name"]) or not balanced(match["head"]):
        return None
    condition = match["condition"].replace(" ", "")
    return match["head"], "" if condition.endswith("{R}") else condition.lower()


def without_real_variable(text: str) -> str | None:
    r"""Returns `x\ne2` for `x\in\mathbb{R}, x\ne2`, and None for any other text."""
    match = _FIRST.fullmatch(text)
    return match["rest"] if match and _mentions(match["rest"], match["name"]) else None


def domain_in_words(condition: str) -> str:
    r"""Returns `k\in\mathbb{z}` for `where k is an integer`, and any other condition in lower case as it is."""
    bare = _OPENING.sub("", condition)
    if match := _INTEGER.fullmatch(bare):
        return rf"{match[1] or match[2]}\in\mathbb{{z}}"
    joined = bare.replace(" ", "")
    return joined if _MEMBERSHIP.fullmatch(joined) else condition


def half_line(text: str) -> Bracket | None:
    r"""Reads `\mathbb{R}^{+}` and `\mathbb{R}_{\ge0}` as intervals. Zero is neither positive nor negative."""
    match = _HALF_LINE.fullmatch(text)
    if match is None:
        return None
    zero, bound = Number(Fraction(0), False), match["bound"]
    if match["sign"] == "+" or bound in (">", r"\ge"):
        return Bracket("[" if bound == r"\ge" else "(", ")", (zero, Expression(r"\infty")))
    return Bracket("(", "]" if bound == r"\le" else ")", (Expression(r"-\infty"), zero))


def _mentions(text: str, name: str) -> bool:
    return name in re.sub(r"\\[a-zA-Z]+", " ", text)
