r"""The grader `published`: grades as the paper's code did, for comparing absolute scores.

That code (the function of PRIME's maths verifier with `fast=False`) accepts a box if any of three rules does: equal
strings after the normalisation of the MATH data set, equal expressions after the normalisation of PRM800K, or
math-verify. The rules are written anew here. docs/rewards.md lists what differs.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex, units
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_rl.types import RewardResult, Sample

from .verifier import HOPELESS, LONGEST_KEPT, read_label

# math-verify warns once per process that its timeouts are off. They are off here on purpose.
for _name in ("math_verify", "math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_MATH = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_UNIT_WORDS = [re.compile(rf"(^|\W){unit}s?($|\W)") for unit in [*units, "a", "percent"]]
"""The words that the published code removes wherever they stand, variables named like one included."""
_UNITS = re.compile(
    r"(?:degree|centimeter|meter|cm|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard)(?:es)?s?"
    r" *(?:\^\d+)?"
)
_MULTIPLES = {"trillion": r"\cdot 10^{12}", "billion": r"\cdot 10^{9}", "million": r"\cdot 10^{6}"}
_FRACTION = re.compile(r"-?\d+/0*[1-9]\d*")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_IGNORED = (
    "text|textbf|textit|textrm|textsf|textsc|texttt|emph|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|underline|"
    "lbrace|rbrace"
)
_INTEGER_WITHIN = 1e-7
"""The published code takes a number so close to an integer for that integer; `1e-9` is 0."""
_INTEGER = re.compile(r"[+-]?\d+(?:\.0*)?")


def verify_as_published(sample: Sample) -> RewardResult:
    r"""Returns score 1 if any rule of the published code accepts the last `\boxed{}`, and 0 otherwise.

    An incomplete last box counts as no box. Raises ValueError if the label is empty.
    """
    gold = read_label(sample.prompt.label)
    answer = _last_box(sample.text)
    if answer is None:
        return RewardResult(0.0, None, "no box")
    rule = accepting_rule(gold, answer) if max(len(gold), len(answer)) <= HOPELESS else None
    return RewardResult(1.0 if rule else 0.0, answer[:LONGEST_KEPT], f"correct ({rule})" if rule else "wrong answer")


@lru_cache(maxsize=4096)
def accepting_rule(gold: str, answer: str) -> str | None:
    """Returns the first rule that accepts the answer: "mathd", "sympy" or "math-verify"; None if none does."""
    if as_in_math(gold) == as_in_math(answer):
        return "mathd"
    if _same_expressions(gold, answer):
        return "sympy"
    return "math-verify" if _math_verify(gold, answer) else None


def as_in_math(text: str) -> str:
    """Returns the normal form of the MATH data set: no units, signs and spaces, one spelling of fractions."""
    text = re.sub(r"^\\text\{(.+?)\}$", r"\1", text.strip())
    text = re.sub(r"\^\{?\\circ\}?|\\%|\\\$", "", text.replace("\n", ""))
    text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text).replace(r"\end{array}", r"\end{pmatrix}")
    text = text.replace("bmatrix", "pmatrix").replace(r"\neq", r"\ne").replace(r"\leq", r"\le").replace(r"\geq", r"\ge")
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"\\text\{.*?\}$", "", text).strip() or text
    for pattern in _UNIT_WORDS * 2:
        text = pattern.sub(r"\1\2", text) or text
    text = text.partition(r"\text{ ")[0]
    name, equals, value = text.partition("=")
    text = value if equals and "=" not in value and len(name.strip()) <= 2 else text
    return normalize_latex(text, _MATH).replace(" ", "")


def as_in_prm800k(text: str) -> str:
    """Returns the normal form of PRM800K: in lower case, without units, signs, spaces and braces."""
    text = re.sub(r"^\\text\{(.+?)\}$", r"\1", text.strip())
    text = re.sub(r"\\?[%$]|\^ *\{?\\circ\}?|,\\! *", "", text)
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for word, factor in _MULTIPLES.items():
        text = text.replace(word, factor)
    text = _UNITS.sub("", text)
    text = re.sub(rf"\\(?:{_IGNORED})(?![a-zA-Z])|(?<=\\sqrt)\[\d+\]", "", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"(?<=\d) +(?=\d)", "+", text.strip().strip("{}"))
    text = re.sub(r"\\(?:left|right|[,;!: ()])(?![a-z])|\\?[{} ]", "", text).lower()
    try:
        value = float(_GROUPED.sub("", text))
    except ValueError:
        return text
    return str(round(value)) if abs(value) < 1e15 and abs(value - round(value)) <= _INTEGER_WITHIN else text


def _same_expressions(gold: str, answer: str) -> bool:
    one, other = as_in_prm800k(gold), as_in_prm800k(answer)
    if one == other:
        return True
    if not other:
        return False
    golds, answers = _elements(one), _elements(other)
    if len(golds) != len(answers) or (len(golds) > 1 and (one[0], one[-1]) != (other[0], other[-1])):
        return False
    return all(map(_same_element, golds, answers))


def _elements(text: str) -> list[str]:
    text = _GROUPED.sub("", text)
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and not re.search(r"[()\[\]]", text[1:-1]):
        return text[1:-1].split(",")
    return [text]


def _same_element(one: str, other: str) -> bool:
    if one == other:
        return True
    # A fraction must be reduced like the label's, and an integer must be written as one.
    if _FRACTION.fullmatch(one) and _FRACTION.fullmatch(other):
        return False
    if bool(_INTEGER.fullmatch(one)) != bool(_INTEGER.fullmatch(other)):
        return False
    letters = set(re.sub(r"sqrt|frac|[^a-z]", "", one + other))
    if len(letters) > 2 or re.search(r"\^[{(]|\^\d+\^|\^\d\d", one + other):
        return False
    try:
        return bool(sympy.simplify(_expression(one) - _expression(other)) == 0)
    except Exception:  # the parser and simplify raise many kinds; the published code counts each as unequal
        return False


def _expression(text: str) -> sympy.Expr:
    text = re.sub(r"(\d)\+(\d+/\d+)", r"(\1+\2)", text.removesuffix("."))
    return latex2sympy(re.sub(r"\\sqrt(\d+|[a-z])", r"\\sqrt{\1}", text), is_real=None)


def _math_verify(gold: str, answer: str) -> bool:
    sides = [
        parse(
            text if "$" in text else f"${text}$",
            extraction_config=_EXTRACTION,
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        for text in (gold, answer)
    ]
    return bool(verify(*sides, timeout_seconds=None))


def _last_box(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{`, or None if it is incomplete."""
    from megatron_rl.utils.boxed import last_boxed

    return last_boxed(text[start:]) if text.startswith(r"\boxed{", start := max(text.rfind(r"\boxed"), 0)) else None
