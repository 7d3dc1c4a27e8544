r"""Finding a response's answer: what its last complete \boxed{} (or \fbox{}) holds."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[^\\]|\\\\(?!boxed|fbox)|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""What the complete box that begins last holds, or None. Escaped braces (`\{`) do not count as nesting.

    One pass, whatever the text: a million characters of braces take about a second.
    """
    waiting: list[int] = []  # where each open brace's content begins; negative: a brace that is no box
    found, begins = None, -1
    for token in _TOKEN.finditer(text):
        if token["box"]:
            waiting.append(token.end())
        elif token["open"]:
            waiting.append(-1)
        elif token["close"] and waiting:
            start = waiting.pop()
            if start > begins:
                found, begins = (start, token.start()), start
    return text[slice(*found)] if found else None
