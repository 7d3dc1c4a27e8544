r"""Braces around the arguments of LaTeX commands."""

from __future__ import annotations

import re

from .scan import argument

_COMMAND = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])|[\^_](?!\\circ)")
_DIGITS = re.compile(r"-?\d+")


def braced(text: str) -> str:
    r"""Puts braces around the arguments of \frac, \binom and \sqrt and around exponents and indices, as TeX reads them.

    An exponent without braces may have several digits: `2^10` is `2^{10}`.
    """
    found, index = [], 0
    while index < len(text):
        match = _COMMAND.match(text, index)
        if not match:
            step = 2 if text[index] == "\\" else 1
            found.append(text[index : index + step])
            index += step
            continue
        index = match.end()
        found.append(match[0])
        if match[0] == r"\sqrt" and text.startswith("[", index) and "]" in text[index:]:
            end = text.index("]", index) + 1
            found.append(text[index:end])
            index = end
        for _ in range(2 if match[1] in ("frac", "binom") else 1):
            digits = _DIGITS.match(text, index) if match[0] in "^_" else None
            part = (digits[0], digits.end()) if digits else argument(text, index)
            if part is None:
                break
            if part[0].startswith("\\text") and len(part[0]) == 5:
                inner = argument(text, part[1])
                part = (rf"\text{{{inner[0]}}}", inner[1]) if inner else part
            found.append(f"{{{braced(part[0])}}}")
            index = part[1]
    return "".join(found)
