r"""Words between numbers: `3\text{ remainder }4`, `2 red 6 blue`, `(a) 3 (b) 4`. None of them is a factor."""

from __future__ import annotations

import re

_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|pi|sqrt"
_LETTER = re.compile(r"\\text\s*\{([a-zA-Z])\}")
"""A roman letter, which is a variable like any other letter."""
_OPERATOR = re.compile(r"\\(?:cdot|times|pm|mp)(?![a-zA-Z])")
_BESIDE_OPERAND = re.compile(r"[\w)}\]'!|]\s*\\text\s*\{|\\text\s*\{[^{}]*\}\s*(?:[\w(]|\\[a-zA-Z{])")
_INDEX = re.compile(r"_\{(?:[^{}]|\{[^{}]*\})*\}|_\w")
_BEFORE_DIGIT = re.compile(rf"(?<![a-zA-Z\\])(?!(?:{_FUNCTIONS})\s*\d)[a-zA-Z]+ ?\d")
_PART = r"[(\[](?:[a-zA-Z]|\d|i{1,3}|iv|vi{0,3}|ix)[)\]]"
_PARTS = re.compile(rf"{_PART}\s*(?:\d|[^\s()\[\]^_+*/=<>'-][^()\[\]]*{_PART}\s*[\w\\-])")


def has_words(text: str) -> bool:
    r"""Returns whether words, letters or labels of parts join the numbers of a text.

    `\text{base}\cdot 3` is a product with a variable, but `3\text{ base}` is none, and neither is `R 3`: nobody writes
    a variable before the number that multiplies it.
    """
    text = _OPERATOR.sub("*", _LETTER.sub(r"\1", _INDEX.sub("", text)))
    return bool(_BESIDE_OPERAND.search(text) or _BEFORE_DIGIT.search(text) or _PARTS.match(text))
