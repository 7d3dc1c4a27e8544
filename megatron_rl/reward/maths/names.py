r"""Names in expressions: whatever the parser would read in a way of its own becomes a plain symbol.

The parser of math-verify reads `I` as the imaginary unit and `\gamma` as Euler's constant, drops primes, and cannot
read many indices. Every such name is replaced by `\Upsilon_{...}` with a number that stands for the name.
"""

from __future__ import annotations

import re

from .numbers import read_number
from .scan import argument

GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|omicron|rho|varrho|sigma|"
    "varsigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Upsilon|Phi|Psi|Omega|hbar|ell|pi|mho"
)
_ACCENTS = (
    "hat|widehat|vec|overrightarrow|overline|bar|dot|ddot|tilde|widetilde|mathcal|mathbb|mathfrak|mathscr|text|overarc|"
    "wideparen"
)
_NAME = re.compile(
    rf"(?P<change>\\Delta ?(?:[a-zA-Z]|\\(?:{GREEK})(?![a-zA-Z])))"
    rf"|\\(?P<accent>{_ACCENTS})(?![a-zA-Z])|\\(?P<greek>{GREEK})(?![a-zA-Z])|(?P<letter>(?<![a-zA-Z\\])[a-zA-Z])"
    r"|\\(?P<figure>angle|triangle|odot|nabla|parallel|overset)(?![a-zA-Z]) ?[A-Z]*|\\[a-zA-Z]+|(?P<more>[a-zA-Z])"
)
_DELTA_ALONE = re.compile(r"\\Delta(?![a-zA-Z]) ?(?:$|[)}+\-*/^]|\\(?:cdot|times|right)(?![a-zA-Z]))")
_DELTA = re.compile(rf"\\Delta ?(?=(?![fghuFGH])[a-zA-Z]|\\(?:{GREEK})(?![a-zA-Z]))")
_CALLED = ("f", "g", "h", "F", "G", "H")
"""Letters that name a function if parentheses follow, as letters in these fonts do: `\\mathcal{P}(A)`."""
_FONTS = ("mathcal", "mathbb", "mathfrak", "mathscr")
_READ_OTHERWISE = ("I", "E", r"\gamma", r"\Gamma", r"\mho")
_PLAIN_WORDS = re.compile(
    r"(?<![a-zA-Z\\])(?:np\.|math\.)?(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|pi)(?![a-zA-Z])"
)
_DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{-?\d+\})?)[({]*(\d+(?:\.\d+)?)\^\\circ[)}]*")
_RECURRING = re.compile(r"\d*\.\d*\\overline\{\d+\}")
_EXPONENT_FIRST = re.compile(r"(?<=[a-zA-Z])(\^\{[^{}]*\})(_\{[^{}]*\})")
_CONJUGATE = re.compile(r"\\(?:overline|bar)\{([\d.+-]*i[\d.+-]*)\}")
_SQUARE = re.compile(
    r"(?P<function>\\(?:sin|cos|tan|cot|sec|csc|ln|log|exp|max|min)(?:_\{[^{}]*\})?(?:\^\{\d+\})?)?(?<!\\sqrt)"
    r"\[(?P<inside>[^\[\]]*)\]"
)
_NUMERIC = re.compile(r"(?:[^a-zA-Z\\]|\\(?:frac|sqrt|cdot|times|pi|ln|log)(?![a-zA-Z]))*")
_DERIVATIVE = re.compile(r"\^\{\((?:\d+|[knm])\)\}")
_TIMES = re.compile(r"(?<=[\d)])(?=\()|(?<=\))(?=\\frac|\d)")


def plain_names(text: str) -> str:
    """Returns the expression with a multiplication sign between number and parenthesis, and with plain names only."""
    text = _PLAIN_WORDS.sub(r"\\\1 ", text)
    text = _DEGREES.sub(r"\1(\\frac{\2\\pi}{180})", text).replace(r"^\circ", "")
    text = _RECURRING.sub(_as_fraction, text)
    text = _CONJUGATE.sub(lambda match: f"({match[1].replace('i', '(-i)')})", text)
    while (bracketed := _SQUARE.sub(_without_brackets, text)) != text:
        text = bracketed
    text = _EXPONENT_FIRST.sub(r"\2\1", text)
    text = _TIMES.sub(r"\\cdot ", text)
    found, index = [], 0
    while match := _NAME.search(text, index):
        found.append(text[index : match.start()])
        name, index = _whole_name(text, match)
        found.append(name)
    return "".join(found) + text[index:]


def with_factors(one: str, other: str) -> tuple[str, str]:
    r"""Reads `4\Delta R` as a product if one of the texts is `4R\Delta`: there is a quantity \Delta of its own."""
    if not (_DELTA_ALONE.search(one) or _DELTA_ALONE.search(other)):
        return one, other
    return _DELTA.sub(r"\\Delta\\cdot ", one), _DELTA.sub(r"\\Delta\\cdot ", other)


def _as_fraction(match: re.Match[str]) -> str:
    number = read_number(match[0])
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}" if number else match[0]


def _whole_name(text: str, match: re.Match[str]) -> tuple[str, int]:
    """Returns the name at `match`, as it is or replaced, and where it ends."""
    name, index = match[0].strip(), match.end()
    if not any(match.groupdict().values()):
        return match[0], index
    if match["change"]:  # `\Delta t` is one quantity
        name = name.replace(" ", "")
    if match["accent"] and (group := argument(text, index)):
        name, index = f"{name}{{{group[0].strip()}}}", group[1]
    is_plain = not (match["accent"] or match["figure"] or match["change"]) and name not in _READ_OTHERWISE
    if text.startswith("'", index) and name != "e":
        end = re.compile("'+").match(text, index).end()  # type: ignore[union-attr]
        name, index, is_plain = name + text[index:end], end, False
    if name != "e" and (order := _DERIVATIVE.match(text, index)):
        count = order[0][3:-2]
        name, index, is_plain = name + ("'" * int(count) if count in "1234" else order[0]), order.end(), False
    if text.startswith("_{", index) and (group := argument(text, index + 1)):
        name, index, is_plain = f"{name}_{group[0].replace(' ', '')}", group[1], False
        if text.startswith("'", index):
            name, index = name + "'", index + 1
    if power := re.compile(r"\^\{(?:T|\\top|\\dagger|\*|\\ast|c|C)\}").match(text, index) if name.isupper() else None:
        name, index, is_plain = name + power[0], power.end(), False
    is_called = name.rstrip("'")[:1] in _CALLED or match["accent"] in _FONTS
    if is_called and text.startswith("(", index) and (end := _closing(text, index)):
        name, index, is_plain = name + text[index:end].replace(" ", ""), end, False
    return (match[0] if is_plain else alias(name)), index


def _closing(text: str, start: int) -> int | None:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return None


def is_numeric(text: str) -> bool:
    """Returns whether a text has no letters, apart from roots, fractions and the like."""
    return _NUMERIC.fullmatch(text) is not None


def _without_brackets(match: re.Match[str]) -> str:
    """Square brackets are parentheses around numbers and arguments. Around others, they may round or index."""
    function = match["function"] or ""
    if function or is_numeric(match["inside"]):
        return f"{function}({match['inside']})"
    return " " + alias(f"[{match['inside'].replace(' ', '')}]")


def alias(name: str) -> str:
    """Returns a symbol that stands for the name."""
    return rf"\Upsilon_{{{int.from_bytes(name.encode(), 'big')}}} "


def name_of_alias(symbol: str) -> str:
    """Returns the name for which a symbol of the parser stands, or an empty text if the symbol is no alias."""
    match = re.fullmatch(r"Upsilon_\{(\d+)\}", symbol)
    number = int(match[1]) if match else 0
    return number.to_bytes((number.bit_length() + 7) // 8, "big").decode(errors="replace")
