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
_SELECTION = re.compile(r"(?:(?<![a-zA-Z\\])[mnN]|\))\}? ?\{?[PC]\}? ?\{?[kmnrR](?![a-zA-Z])")
"""The numbers of permutations and combinations `nPr` and `(n+1)Cr`, which are no products."""
_OPERATOR_LETTER = (
    r"\\(?:(?:mathcal|mathbb|mathscr|mathfrak|cal|hat|widehat)(?: ?\{[^{}]*\}| ?\\?[a-zA-Z]+)"
    r"|(?:nabla|partial)(?![a-zA-Z]))'*(?:\^\{[^{}]*\})?"
)
_SIGNS = "cdot|times|pm|mp|cup|cap|setminus|le|ge|ne|in|to|mid|dots|sim|approx"
_APPLIED = re.compile(
    rf"{_OPERATOR_LETTER} ?(?:\w|\\(?!(?:{_SIGNS})(?![a-zA-Z]))[a-zA-Z])"
    rf"|{_OPERATOR_LETTER} ?\\times|\\times ?{_OPERATOR_LETTER}"
)
r"""Letters that may be operators before their operand: `n\mathcal{C}r`, `\mathcal{L}f`, `\hat{H}\psi`, `\nabla f`."""
_PART = r"[(\[](?:[a-zA-Z]|\d|i{1,3}|iv|vi{0,3}|ix)[)\]]"
_PARTS = re.compile(rf"{_PART}\s*(?:\d|[^\s()\[\]^_+*/=<>'-][^()\[\]]*{_PART}\s*[\w\\-])")


def has_words(text: str) -> bool:
    r"""Returns whether words, letters or labels of parts join the numbers of a text.

    `\text{base}\cdot 3` is a product with a variable, but `3\text{ base}` is none, and neither is `R 3`: nobody writes
    a variable before the number that multiplies it. A letter in calligraphic type or with a hat may be an operator
    unless a sign of multiplication says that it is a factor.
    """
    if _APPLIED.search(_INDEX.sub("", text)):
        return True
    text = _OPERATOR.sub("*", _LETTER.sub(r"\1", _INDEX.sub("", text)))
    found = (pattern.search(text) for pattern in (_BESIDE_OPERAND, _BEFORE_DIGIT, _SELECTION))
    return any(found) or _PARTS.match(text) is not None
