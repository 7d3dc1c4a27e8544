r"""Normalisation of LaTeX to one spelling. Every rule here preserves the meaning."""

from __future__ import annotations

import re
import unicodedata

from .fonts import plain_fonts
from .scan import argument

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011", "-"),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u2033", '"'),
    **dict.fromkeys("\u00a0\u2009\u202f\n\t\r", " "),
    **dict.fromkeys("\u200b\ufeff\u2061\u2062", ""),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/",
    "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "≡": r"\equiv ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ",
    "∖": r"\setminus ", "。": ".", "•": r"\cdot ", "∙": r"\cdot ", "˚": r"^\circ ", "⩽": r"\le ", "⩾": r"\ge ", "«": '"', "»": '"',
    "…": r"\dots ", "⋯": r"\dots ", "→": r"\to ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∠": r"\angle ", "℃": r"^\circ C", "℉": r"^\circ F",
    "Ω": r"\Omega ", "µ": r"\mu ", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "∧": r"\text{and}", "∨": r"\text{or}", "％": r"\%", "√": r"\sqrt", "∛": r"\sqrt[3]",
}  # fmt: skip
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right|middle)(?![a-zA-Z])\s*\.(?!\d)", ""),
        (r"\\(?:left|right|middle|displaystyle|textstyle|scriptstyle|limits|nolimits|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"(?<!\\)((?:\\\\)*)\\[()\[\]]", r"\1"),
        (r"(?<!\\)\$", ""),
        (r"(?<=\d),\\!\s*(?=\d{3}(?!\d))|(?<=\d)\{,\}(?=\d{3}(?!\d))", ""),
        (r"(?<=\d)(?:\\,|\\ |~|\\;|\\thinspace)(?=\d{3}(?!\d))", ""),
        (r"\{([,:;])\}", r"\1"),
        (r"\\!", ""),
        (r"^(.*\\in ?)?\\mathbf\s*\{R\}$", r"\1\\mathbb{R}"),
        (r"\\imath(?![a-zA-Z])", "i"),
        (r"\\(?:text|mathrm)\s*\{ ?(Rs\.?|USD|EUR|GBP) ?\} ?(?=\d)", r"\1 "),
        (r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|thinspace|enspace|hfill|newline)(?![a-zA-Z]))|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:varnothing|oldemptyset)(?![a-zA-Z])", r"\\emptyset"),
        (r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])|<=|=<", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|\\not\s*=|!=", r"\\ne "),
        (r"\\(?:approxeq|simeq|doteq)(?![a-zA-Z])", r"\\approx "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\(?:mid|vert|lvert|rvert)(?![a-zA-Z])", "|"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\(?:ldots|cdots|dotsc|dotsb)(?![a-zA-Z])|(?<!\.)\.\.\.(?!\.)", r"\\dots "),
        (r"\\(?:backslash|smallsetminus)(?![a-zA-Z])", r"\\setminus "),
        (r"\\(?:land|wedge)(?![a-zA-Z])", r"\\text{and}"),
        (r"\\(?:lor|vee)(?![a-zA-Z])", r"\\text{or}"),
        (r"\\(?:ast)(?![a-zA-Z])", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\(?:bmod|mod)(?![a-zA-Z])", r"\\mod "),
        (r"\\(?:dfrac|qed|blacksquare|square|checkmark)\s*$", ""),
        (r"\\(?:pounds|textsterling)(?![a-zA-Z])", "£"),
        (r"\\(?:texteuro|euro)(?![a-zA-Z])", "€"),
        (r"\\textdollar(?![a-zA-Z])", r"\\$"),
        (r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}(\^\{?\d\}?)?\s*\}", r"\\text{\1/\2}\3"),
        (r"\\infin(?![a-zA-Z])", r"\\infty"),
        (r"\\(?:Reals|reals|R)(?![a-zA-Z])|\\Bbb\s*\{?\s*R\s*\}?|\\mathbb\s+R|\\mathbb\s*\{\s*R\s*\}|\\mathbf\s*\{\s*R\s*\}",
         r"\\mathbb{R}"),
        (r"\\mathbb\s*\{?\s*([ZNQC])\s*\}?", r"\\mathbb{\1}"),
        (r"\\lg(?![a-zA-Z])", r"\\log_{10}"),
        (r"\\(?:tg)(?![a-zA-Z])", r"\\tan"),
        (r"\\(?:ctg|cotg)(?![a-zA-Z])", r"\\cot"),
        (r"\\(?:arctg)(?![a-zA-Z])", r"\\arctan"),
        (r"\\(?:cosec)(?![a-zA-Z])", r"\\csc"),
        (r"\^\s*\{\s*\\prime\s*\\prime\s*\}|\^\s*\\prime\s*\\prime", "''"),
        (r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime(?![a-zA-Z])", "'"),
        (r"\^?\s*\\degree(?:s)?(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|(?<=\d)\s*\\circ(?![a-zA-Z])",
         r"^\\circ "),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"^(.*)\\over(?![a-zA-Z])(.*)$", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"^\\begin\{cases\}([^&]*?)(?:\\\\)?\s*\\end\{cases\}$", lambda match: match[1].replace(r"\\", ", ")),
        # Recurring decimals in one spelling.
        (r"(?<=\.)(\d*)\\(?:overline|bar|dot|overset\{\.\})\s*\{?(\d+)\}?", r"\1\\overline{\2}"),
        (r"(?<=\.)(\d*)\((\d+)\)(?!\d)", r"\1\\overline{\2}"),
        (r"(?<![a-zA-Z\\])\\?sqrt\s*\(([^()]*)\)|\\sqrt\s*\(([^()]*)\)|(?<![a-zA-Z\\])sqrt(\d+)", r"\\sqrt{\1\2\3}"),
        (r"\\sqrt(\[\d+\])?\s*(\d+|[a-zA-Z])", r"\\sqrt\1{\2}"),
        (r"(?<=[\w)}]) ?\*\* ?(?=[\w({\\-])", "^"),
        (r"\^ ?\(([^()]*)\)", r"^{\1}"),
        (r"\\(max|min|gcd|lcm) ?\\\{([^{}]*)\\\}", r"\\\1(\2)"),
        (r"\s+", " "),
        (r"(\\[a-zA-Z]+) (?![a-zA-Z])", r"\1"),
        (r" ?([=<>+\-*/(){}\[\]^&|]) ?", r"\1"),
    ]
]  # fmt: skip
_STRAY = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\*\*(?P<inside>[^*]+)\*\*",
        r"__(?P<inside>[^_]+)__",
        r"\*(?P<inside>[^*]+)\*",
        r"_(?P<inside>[^_{]+)_",
        r"`+(?P<inside>[^`]+)`+",
        r"(?P<quote>[\"'])(?P<inside>[^\"']+)(?P=quote)",
        r"(?:=|\\approx|\\therefore|\\Rightarrow|\\implies|:)\s*(?P<inside>[^=].*)",
        r"(?P<inside>.*\S)\s*(?:[.,;]|\\\\|(?<!\\)\\)",
        r"(?P<inside>.*[\w)}\]%.])\s*\?",
    )
]
_EMPTY_GROUP = re.compile(r"(?<![\^_}a-zA-Z])\{\}|^\{\}|\{\}$")


def normalise(latex: str) -> str:
    """Returns the same mathematics in one spelling of characters, fonts, spaces, signs and arguments."""
    text = bare_answer(plain_characters(latex), with_braces=True)
    for pattern, replacement in _RULES[:12]:
        text = pattern.sub(replacement, text)
    text = plain_fonts(text)
    for pattern, replacement in _RULES[12:]:
        text = pattern.sub(replacement, text)
    return bare_answer(braced(text))


def plain_characters(text: str) -> str:
    """Replaces typographic characters by LaTeX: vulgar fractions, roots, exponents, Greek letters and the like."""
    found = []
    for character in text:
        if character in _CHARACTERS:
            found.append(_CHARACTERS[character])
        elif character.isascii():
            found.append(character)
        else:
            found.append(_plain_character(character))
    return re.sub(r"(?<=[\d+-])\}([\^_])\{(?=[\d+-])", "", "".join(found))


def _plain_character(character: str) -> str:
    kind, _, letters = unicodedata.decomposition(character).partition("> ")
    plain = unicodedata.normalize("NFKC", character).replace("\u2044", "/").replace("\u2212", "-")
    if kind == "<fraction":
        over, _, under = plain.partition("/")
        return rf"\frac{{{over}}}{{{under}}}"
    if kind == "<super" and letters:
        return f"^{{{plain}}}"
    if kind == "<sub" and letters:
        return f"_{{{plain}}}"
    name = unicodedata.name(character, "")
    if match := re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (?:FINAL )?([A-Z]+)", name):
        letter = match[2].lower().replace("lamda", "lambda")
        return rf"\{letter if match[1] == 'SMALL' else letter.capitalize()} "
    return plain if kind in ("<wide", "<font", "<compat", "<narrow") else character


def braced(text: str) -> str:
    r"""Puts braces around the arguments of \frac, \binom and \sqrt and around exponents and indices, as TeX reads them.

    An exponent without braces may have several digits: `2^10` is `2^{10}`.
    """
    found, index = [], 0
    while index < len(text):
        match = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])|[\^_](?!\\circ)").match(text, index)
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
            digits = re.compile(r"-?\d+").match(text, index) if match[0] in "^_" else None
            part = (digits[0], digits.end()) if digits else argument(text, index)
            if part is None:
                break
            if part[0].startswith("\\text") and len(part[0]) == 5:
                inner = argument(text, part[1])
                part = (rf"\text{{{inner[0]}}}", inner[1]) if inner else part
            found.append(f"{{{braced(part[0])}}}")
            index = part[1]
    return "".join(found)


def bare_answer(text: str, with_braces: bool = False) -> str:
    """Removes what may surround an answer: spaces, a leading equals sign, a final full stop, quotes, braces, asterisks."""
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
