r"""Normalisation of LaTeX to one spelling. Every rule here preserves the meaning."""

from __future__ import annotations

import re

from .braces import braced
from .characters import plain_characters
from .fonts import plain_fonts
from .scan import argument

_SPELLINGS = {
    r"\emptyset ": "varnothing oldemptyset",
    r"\le ": "leq leqq leqslant",
    r"\ge ": "geq geqq geqslant",
    r"\ne ": "neq",
    r"\approx ": "approxeq simeq doteq",
    "<": "lt",
    ">": "gt",
    ":": "colon",
    "|": "mid vert lvert rvert",
    r"\{": "lbrace",
    r"\}": "rbrace",
    "[": "lbrack",
    "]": "rbrack",
    r"\dots ": "ldots cdots dotsc dotsb",
    r"\setminus ": "backslash smallsetminus",
    r"\epsilon ": "varepsilon",
    r"\vec": "overrightarrow",
    r"\phi ": "varphi",
    r"\land ": "wedge",
    r"\lor ": "vee",
    "*": "ast",
    "/": "div",
    r"\mod ": "bmod",
    r"\$": "textdollar",
    "\u00a3": "pounds textsterling",
    "\u20ac": "texteuro euro",
    r"\infty ": "infin",
    r"\mathbb{R}": "R Reals reals",
    "i ": "imath",
    r"\log_{10}": "lg",
    r"\tan ": "tg",
    r"\cot ": "ctg cotg",
    r"\arctan ": "arctg",
    r"\csc ": "cosec",
    r"\frac": "dfrac tfrac cfrac",
    r"\binom": "dbinom tbinom",
    r"^\circ ": "degree degrees",
    " ": "quad qquad thinspace enspace hfill newline",
    "": "left right middle displaystyle textstyle scriptstyle limits nolimits mathopen mathclose unboldmath"
    " big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr",
}
_COMMANDS = {name: spelled for spelled, names in _SPELLINGS.items() for name in names.split()}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")

Rules = list[tuple[re.Pattern[str], str]]
_BEFORE_FONTS: Rules = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right|middle)(?![a-zA-Z])\s*\.(?!\d)", ""),
        (r"\\(?:qed|blacksquare|square|checkmark)\s*$", ""),
        (r"(?<!\\)((?:\\\\)*)\\[()\[\]]|(?<!\\)\$", r"\1"),
        # Separators of thousands, then spaces.
        (r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ |~|\\;|\\thinspace)(?=\d{3}(?!\d))", ""),
        (r"\{([,:;])\}", r"\1"),
        (r"\\!", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\[hv]space\*?\s*\{[^{}]*\}", " "),
        (r"(?<=\d)\s*\\deg(?!\s*[a-zA-Z({\\])|(?<=\d)\^\{?\\(?:text|mathrm)\{o\}\}?", r"^\\circ "),
        (r"^\s*\\text\s*\{\s*(?i:(?:the )?(?:final )?answer(?: is)?)\s*:?\s*\}\s*[=:]?(?=\s*\S)", ""),
        (r"^\s*(?i:(?:final )?answer)\s*:\s*(?=\S)", ""),
        (r"^(.*\\in ?)?\\mathbf\s*\{R\}$|\\Bbb\s*\{?\s*R\s*\}?", r"\1\\mathbb{R}"),
        (r"\\mathbb\s*\{?\s*([RZNQC])\s*\}?", r"\\mathbb{\1}"),
        (r"\\(?:text|mathrm)\s*\{ ?(Rs\.?|USD|EUR|GBP) ?\} ?(?=\d)", r"\1 "),
    ]
]
_AFTER_FONTS: Rules = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"<=|=<", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\not\s*=|!=", r"\\ne "),
        (r"(?<!\.)\.\.\.(?!\.)", r"\\dots "),
        (r"\^\s*\{\s*\\prime\s*\\prime\s*\}|\^\s*\\prime\s*\\prime", "''"),
        (r"(?<=\d)\"", "''"),
        (r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime(?![a-zA-Z])", "'"),
        (r"(?:\^\s*)+(?:\{\s*\^?\\circ\s*\}|\\circ(?![a-zA-Z]))|(?<=\d)\s*\\circ(?![a-zA-Z])", r"^\\circ "),
        (
            r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}(\^\{?\d\}?)?\s*\}",
            r"\\text{\1/\2}\3",
        ),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}|^(.*)\\over(?![a-zA-Z])(.*)$", r"\\frac{\1\3}{\2\4}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"^\\begin\{cases\}([^&\\]*)\\\\([^&\\]*)(?:\\\\)?\s*\\end\{cases\}$", r"\1, \2"),
        # Recurring decimals in one spelling.
        (r"(?<=\.)(\d*)\\dot\{?(\d)\}?(\d*)\\dot\{?(\d)\}?(?!\d)", r"\1\\overline{\2\3\4}"),
        (r"(?<=\.)(\d*)\\(?:overline|bar|dot|overset\{\.\})\s*\{?(\d+)\}?", r"\1\\overline{\2}"),
        (r"(?<=\.)(\d*)\((\d+)\)(?!\d)", r"\1\\overline{\2}"),
        (r"\\log_(\d)(\d+)(?=$|[-+=<>)},/])", r"\\log_{\1}\2"),  # as TeX reads it
        # Mathematics typed as in a program.
        (r"(?<![a-zA-Z])\\?sqrt\s*\(([^()]*)\)|(?<![a-zA-Z\\])sqrt(\d+)", r"\\sqrt{\1\2}"),
        (r"(?<=[\w)}]) ?\*\* ?(?=[\w({\\-])", "^"),
        (r"\^ ?\(([^()]*)\)", r"^{\1}"),
        (r"\\(max|min|gcd|lcm) ?\\\{([^{}]*)\\\}", r"\\\1(\2)"),
        (r"\\(vec|overrightarrow|hat|mathcal|mathscr|mathfrak) ?(\\[ij]math|[a-zA-Z])(?![a-zA-Z])", r"\\\1{\2}"),
        (r"\s+", " "),
        (r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1"),
        (r" ?([=<>+\-*/(){}\[\]^&|]) ?", r"\1"),
    ]
]
_STRAY = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"(?P<mark>\*\*|__|\*|`+|[\"'])(?P<inside>[^*_`\"']+)(?P=mark)",
        r"_(?P<inside>[^_{]+)_",
        r"(?:=+|\\approx|\\therefore|\\Rightarrow|\\implies|:)\s*(?P<inside>[^=].*)",
        r"(?P<inside>.*\S)\s*(?:[.,;]|\\\\|(?<!\\)\\)",
        r"(?P<inside>.*[\w)}\]%.])\s*\?",
    )
]
_RECURRING = re.compile(r"((?<!\d)\d{0,12}\.\d{0,12}?)(\d{1,3}?)\2{2,30}\s*(?:\\[lc]?dots(?![a-zA-Z])|\.\.\.)")
"""Digits that stand three times before dots recur: `2.333\\ldots`."""
_EMPTY_GROUP = re.compile(r"(?<![\^_}a-zA-Z])\{\}|^\{\}|\{\}$")


_BOLD = r"\\(?:mathbf|boldsymbol|bm|pmb)\s*(?:\{\s*([a-zA-Z])\s*\}|([a-zA-Z])(?![a-zA-Z]))"
_BOLD_LETTER = re.compile(_BOLD)
_BOLD_PRODUCT = re.compile(rf"{_BOLD}\s*\\times|\\times\s*{_BOLD}")


def normalise(latex: str) -> str:
    """Returns the same mathematics in one spelling of characters, fonts, spaces, signs and arguments."""
    text = bare_answer(_RECURRING.sub(r"\1\\overline{\2}", plain_characters(latex)), with_braces=True)
    text = _replaced(text, _BEFORE_FONTS)
    if _BOLD_PRODUCT.search(text):  # bold letters are vectors here, and the order of a vector product matters
        text = _BOLD_LETTER.sub(r"\\vec{\1\2}", text)
    text = plain_fonts(_COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), text))
    return bare_answer(braced(_replaced(text, _AFTER_FONTS)))


def _replaced(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def bare_answer(text: str, with_braces: bool = False) -> str:
    """Removes what may surround an answer: spaces, quotes, asterisks, a leading equals sign, a full stop, braces."""
    while True:
        before, text = text, _EMPTY_GROUP.sub("", text.strip())
        for pattern in _STRAY:
            if match := pattern.fullmatch(text):
                text = match["inside"].strip()
        group = argument(text, 0) if text.startswith("{") and not with_braces else None
        if group and group[1] == len(text):
            text = group[0]
        if text == before:
            return text


def compact(text: str) -> str:
    """Removes fonts, redundant braces and spaces. Texts that are then equal differ in typesetting only."""
    text = re.sub(r"\{(\w)\}", r"\1", re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text))
    return re.sub(r"(?<![\d\\a-zA-Z]) | (?![\da-zA-Z])", "", text).strip()
