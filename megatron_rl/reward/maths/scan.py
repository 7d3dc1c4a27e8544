r"""Scanning of LaTeX at the top level: tokens, brackets and separators that no bracket encloses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_TOKEN = re.compile(r"\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil")
_CLOSING = (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil")


@dataclass(frozen=True)
class Token:
    """A character or a LaTeX command of a text."""

    text: str
    start: int
    end: int
    depth: int
    """Number of brackets around the token. A bracket counts as lying outside of itself."""


def tokens(text: str) -> Iterator[Token]:
    """Yields the tokens of a text in order."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _CLOSING or token.startswith(r"\end{"):
            depth -= 1
        yield Token(token, match.start(), match.end(), depth)
        if token in _OPENING or token.startswith(r"\begin{"):
            depth += 1


def balanced(text: str) -> bool:
    """Returns whether every bracket of the text has its partner. The two partners may differ, as in `[0,1)`."""
    depth = 0
    for token in tokens(text):
        depth = token.depth
        if depth < 0:
            return False
        if token.text in _OPENING or token.text.startswith(r"\begin{"):
            depth += 1
    return depth == 0


def split(text: str, is_separator: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Returns the parts between the separators of the top level, stripped, and these separators."""
    parts, separators, start = [], [], 0
    for token in tokens(text):
        if token.depth == 0 and is_separator(token.text):
            parts.append(text[start : token.start].strip())
            separators.append(token.text)
            start = token.end
    return [*parts, text[start:].strip()], separators


def enclosed(text: str) -> tuple[str, str, str] | None:
    """Returns the outer brackets of a text and what they enclose, or None if no one pair encloses all of it."""
    found = list(tokens(text))
    if len(found) < 2 or found[0].text not in _OPENING or found[-1].text not in _CLOSING:
        return None
    if any(token.depth == 0 for token in found[1:-1]) or found[-1].depth != 0:
        return None
    return found[0].text, text[found[0].end : found[-1].start].strip(), found[-1].text


def argument(text: str, start: int) -> tuple[str, int] | None:
    """Returns the content of the brace group or the single token at `start`, without braces, and where it ends."""
    while start < len(text) and text[start] == " ":
        start += 1
    if start >= len(text):
        return None
    if text[start] != "{":
        match = _TOKEN.match(text, start)
        return (match[0], match.end()) if match and match[0] != "}" else None
    depth = 0
    for match in _TOKEN.finditer(text, start):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    return None
