r"""Extraction of an answer: the content of the last complete \boxed{} (or \fbox{}) of a text."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[^\\]|\\\\(?!boxed|fbox)|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the complete box that begins last, or None without one.

    Escaped braces (`\{`) do not count as nesting. The search takes one pass over any text: a million characters of
    braces take about a second.
    """
    waiting: list[int] = []  # per open brace, where its content begins; negative for a brace that opens no box
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
