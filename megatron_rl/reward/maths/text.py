"""Normalisation of LaTeX to one spelling. Every rule here preserves the meaning."""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "≤": r"\le ",
        "≥": r"\ge ",
        "\u222a": r"\cup ",
        "\u2229": r"\cap ",
        "∅": r"\emptyset ",
        "\uff05": r"\%",
        "\u00a0": " ",
        "\n": " ",
        "\t": " ",
    }
)
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\[()\[\]]|(?<!\\)\$|\\displaystyle|\\left(?![a-z])|\\right(?![a-z])|\\[bB]igg?[lr]?(?![a-z])", ""),
        (r"\\!\s*", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])", " "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:varnothing|oldemptyset)(?![a-z])", r"\\emptyset"),
        (r"\\leqs?l?a?n?t?(?![a-z])", r"\\le"),
        (r"\\geqs?l?a?n?t?(?![a-z])", r"\\ge"),
        (r"\\(?:mathbf|mathit|mathsf|boldsymbol|bm)\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:text)?color\s*\{[^{}]*\}|\\underline(?![a-z])", ""),
        (r"^\s*\\\{\s*[a-zA-Z]\s*(?:\\mid|\||:)\s*(.*)\\\}$", r"\1"),
        (r"\{,\}", ","),
        (r"\^?\s*\\degree(?![a-z])", r"^\\circ"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"^(.*)\\over(?![a-z])(.*)$", r"\\frac{\1}{\2}"),
        (r"^\\text\s*\{\s*([-\d.,]+) ([^{}\d]*)\}$", r"\1\\text{ \2}"),
        # math-verify gives these two letters meanings of its own and drops their index.
        (r"(?<![a-zA-Z\\])E_", r"\\Xi_"),
        (r"(?<![a-zA-Z\\])I_", r"\\Upsilon_"),
        (r"^\s*[a-zA-Z]\s*\\in(?![a-z])", ""),
        # A degree sign in the argument of a function. Elsewhere the degree sign is a unit.
        (
            r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{?-?\d+\}?)?)\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?",
            r"\1(\\frac{\2\\pi}{180})",
        ),
        (r"\s+", " "),
        (r" ([,;])", r"\1"),
        (r" ?([=<>+\-*/(){}\[\]^&]) ?", r"\1"),
    ]
]
_GROUPED_DIGITS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(\.\d+)?")
_STRAY_DIGITS = re.compile(r"\d \d")
_FONT = re.compile(r"\\(?:text(?:bf|it|rm|normal|up)?|mathrm|mbox|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_][^\W_'\u2019 -]*")
_CHOICE = re.compile(r"\(?([A-Z])[).]?")


def normalise(latex: str) -> str:
    """Returns the same mathematics in one spelling of fonts, spaces, Unicode signs and degrees inside functions."""
    text = latex.translate(_CHARACTERS)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _unwrapped(text)


def ungrouped(text: str) -> str:
    """Removes the separators of `1,234,567` and `1 234 567`. Returns any other text unchanged."""
    return re.sub(r"[, ]", "", text) if _GROUPED_DIGITS.fullmatch(text) else text


def has_stray_digits(text: str) -> bool:
    """Returns whether numbers stand side by side (`3 4 5`). This has no meaning, but parsers guess a sum or product."""
    return _STRAY_DIGITS.search(ungrouped(text)) is not None


def words(text: str) -> str | None:
    r"""Returns the answer as plain words in lower case (`\text{Tuesday}`, `even`, the choice `(B)`), or None.

    Outside of a text command, up to three letters count as a product of variables.
    """
    plain = _FONT.sub(r"\1", text).strip()
    if choice := _CHOICE.fullmatch(plain):
        return choice[1].lower()
    plain = plain.rstrip(".!").strip()
    spoken = _FONT.match(text) is not None
    is_words = _WORDS.fullmatch(plain) and (spoken or (len(plain) > 3 and not re.search(r"\d", plain)))
    return plain.casefold() if is_words else None


def bare(text: str) -> str:
    """Removes fonts, redundant braces and spaces. Texts that are then equal differed in typesetting only."""
    text = re.sub(r"\{(\w)\}", r"\1", _FONT.sub(r"\1", text))
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _unwrapped(text: str) -> str:
    """Removes what may surround an answer: spaces, a final full stop, one pair of braces."""
    text = text.strip()
    text = text[:-1].strip() if text.endswith(".") else text
    inner = text[1:-1]
    if text.startswith("{") and text.endswith("}") and "{" not in inner and "}" not in inner:
        return inner.strip()
    return text
