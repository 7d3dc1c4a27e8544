r"""The signs \pm and \mp: one expression that stands for several."""

from __future__ import annotations

import re
from itertools import product

_SIGN = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
MOST_SIGNS = 4


def without_plus_minus(text: str) -> list[str]:
    r"""Returns the expressions that a text with \pm stands for, or the text itself.

    Several \pm are independent of each other, unless \mp says that they are not.
    """
    found = _SIGN.findall(text)
    if not found or len(found) > MOST_SIGNS:
        return [text]
    if r"\mp" in found:
        choices = [["+" if sign == first else "-" for sign in found] for first in (r"\pm", r"\mp")]
    else:
        choices = [list(signs) for signs in product("+-", repeat=len(found))]
    return [_clean(_replaced(text, signs)) for signs in choices]


def _replaced(text: str, signs: list[str]) -> str:
    remaining = iter(signs)
    return _SIGN.sub(lambda match: next(remaining), text)


def _clean(text: str) -> str:
    """A plus sign that opens an expression says nothing, and parsers refuse it."""
    return re.sub(r"(^|[({\[,=<>])\+ ?", r"\1", text).strip()
