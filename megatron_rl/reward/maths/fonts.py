r"""Fonts of LaTeX: mathematical fonts disappear, and every text font becomes \text."""

from __future__ import annotations

import re

from .scan import argument

_TEXT = (
    "text|textbf|textit|textrm|textnormal|textup|textsf|texttt|textsc|textmd|textsl|emph|mbox|hbox|mathrm|"
    r"operatorname\*?|rm"
)
_MATHS = (
    "mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb|bf|it|sf|tt|boxed|fbox|framebox|bold|boldmath|underline|uline|ensuremath|mathop|mathord|"
    "small|large|Large|LARGE|huge|Huge|normalsize|bfseries|itshape"
)
_COMMAND = re.compile(
    rf"\\(?:(?P<text>{_TEXT})|(?P<maths>{_MATHS})|(?P<color>textcolor|colorbox|color)|(?P<hidden>h?phantom))(?![a-zA-Z])"
)
_SWITCH = re.compile(
    r"\{\s*\\(?:bf|it|sf|tt|rm|bfseries|itshape|small|large|Large|LARGE|huge|Huge|normalsize)(?![a-zA-Z])\s*"
)
_LEADING_SWITCH = re.compile(
    r"^\s*\\(?:bf|it|sf|tt|rm|bfseries|itshape|small|large|Large|huge|normalsize)(?![a-zA-Z])\s*(?!\{)"
)
_FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|lg|exp|det|gcd|max|min|deg|dim|ker|arg"
    "|tg|ctg|arctg|cosec|arsinh|arcosh|artanh|arcsinh|arccosh|arctanh|coth|arccot|lcm"
)
_ALSO_CALLED = {"tg": "tan", "ctg": "cot", "cotg": "cot", "arctg": "arctan", "cosec": "csc"}
_RENAMED = {"sh": "sinh", "ch": "cosh", "th": "tanh", "cth": "coth", "arcctg": "arccot"}
_UNITS_TOO = ("min", "deg")
_ARGUMENT = re.compile(r"[\s~]*[\w(\[{\\^|]")
"""What follows the secant, but not the seconds of `36\\text{ sec}`."""
_IS_FUNCTION = re.compile(rf"(?:{_FUNCTIONS})")
_LETTERS = re.compile(r"\s*[^\W\d_]{3,}[^\W\d_ .,'-]*(?:[ -][^\W\d_]+)*\s*")


def plain_fonts(text: str) -> str:
    r"""Removes fonts, colours and boxes of mathematics, and spells every font of text as \text{...}.

    Names of functions become commands (`\operatorname{tg}` -> `\tg`); roman i, e and d become letters.
    """
    text = _LEADING_SWITCH.sub("", text)
    text = _SWITCH.sub(lambda match: r"\text{" if "rm" in match[0] else r"\mathbf{", text)
    found, index = [], 0
    while match := _COMMAND.search(text, index):
        found.append(text[index : match.start()])
        group = argument(text, match.end())
        if group is None:
            index = match.end()
            continue
        content, index = group
        if match["color"]:
            inner = argument(text, index) if match["color"] != "color" else None
            if inner:
                content, index = inner
                found.append(plain_fonts(content))
        elif match["text"]:
            is_unit = content.strip() == "sec" and not _ARGUMENT.match(text, index)
            content = plain_fonts(content) if "\\" in content else content
            found.append(rf"\text{{{content}}}" if is_unit else _text(content, match["text"]))
        elif match["maths"]:
            content = plain_fonts(content)
            space = " " if content[:1].isalpha() and re.search(r"\\[a-zA-Z]+$", "".join(found)) else ""
            found.append(rf"\text{{{content}}}" if _LETTERS.fullmatch(content) else space + content)
    return "".join(found) + text[index:]


def _text(content: str, command: str) -> str:
    name = content.strip()
    name = _ALSO_CALLED.get(name, name)
    if command.startswith("operatorname"):
        name = _RENAMED.get(name, name)
    if _IS_FUNCTION.fullmatch(name) and (command.startswith("operatorname") or name not in _UNITS_TOO):
        return rf"\{name} "
    if name in ("i", "e", "d"):
        return name
    if re.search(r"\\text\s*\{|\\(?:frac|sqrt|pi)|\^", name) or not re.search(r"[^\W\d_]", name):
        return f" {name} " if name else " "
    return rf"\text{{{content}}}"
