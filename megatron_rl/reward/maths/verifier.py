r"""The maths verifier: compares the last \boxed{} of a response with the label."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from megatron_rl.types import RewardResult, Sample
from megatron_rl.utils.boxed import last_boxed

from .numbers import Number, read_number, same_number
from .text import bare, has_stray_digits, normalise, words
from .units import PERCENT, Unit, in_radians, split_unit

LONGEST_KEPT = 200
"""Characters of an answer that results and dumps keep."""
HOPELESS = 10_000
"""Characters above which an answer is not even normalised."""


def verify_maths(sample: Sample) -> RewardResult:
    r"""Returns score 1 if the content of the last complete `\boxed{}` equals the label as mathematics, and 0 otherwise.

    The label is a number, plain LaTeX or LaTeX with its own box. Raises ValueError if the label is empty. A response
    without a complete box scores 0, truncated or not. Some comparisons never end, so the caller must limit the time, as
    `RewardPool` does by killing the process. The timeouts of math-verify are off: they need SIGALRM and would count a
    timeout as a wrong answer. docs/rewards.md states the conventions for units, percent, decimals and lists.
    """
    gold = _read_label(sample.prompt.label)
    answer = last_boxed(sample.text)
    if answer is None:
        return RewardResult(0.0, None, "no box")
    detail = _judge(gold, answer) if len(answer) <= HOPELESS else "answer too long"
    return RewardResult(1.0 if detail == "correct" else 0.0, answer[:LONGEST_KEPT], detail)


@lru_cache(maxsize=4096)
def _judge(gold: str, answer: str) -> str:
    """Compares label and answer, and returns "correct" or the reason for score 0.

    Results are cached because the responses to one prompt share few distinct answers.
    """
    gold, answer = normalise(gold), normalise(answer)
    if not any(character.isalnum() for character in answer) and answer != gold and r"\{\}" not in answer:
        return "unreadable answer"
    if bare(gold) == bare(answer):
        return "correct"
    if _contradict(gold, answer):
        return "wrong answer"
    if (gold_words := words(gold)) is not None and (answer_words := words(answer)) is not None:
        return "correct" if gold_words == answer_words else "wrong answer"
    (gold, gold_unit), (answer, answer_unit) = in_radians(split_unit(gold), split_unit(answer))
    scales = _scales(gold_unit, answer_unit)
    if gold == answer and 1 in scales:
        return "correct"
    if (a := read_number(gold)) and (b := read_number(answer)):
        same = (same_number(a, Number(b.value * scale, b.is_decimal)) for scale in scales)
        return "correct" if any(same) else "wrong answer"
    if has_stray_digits(answer):
        return "unreadable answer"
    return _compare(gold, answer, scales)


def _compare(gold: str, answer: str, scales: list[Fraction]) -> str:
    from .algebra import TooLarge, read, same_expression  # sympy takes a second to import, and a pool may never need it

    try:
        left, right = read(gold), read(answer)
    except TooLarge:
        return "answer too large to compare"
    return "correct" if any(same_expression(left, right, scale) for scale in scales) else "wrong answer"


def _contradict(gold: str, answer: str) -> bool:
    """Returns whether the two differ in a way that math-verify overlooks: pair and set, derivative and function."""
    pair, braces = ("(", ")"), (r"\{", r"\}")
    for one, other in ((gold, answer), (answer, gold)):
        if one.startswith(pair[0]) and one.endswith(pair[1]) and other.startswith(braces[0]) and "(" not in other:
            return True
    return gold.count("'") != answer.count("'")


def _scales(gold: Unit | None, answer: Unit | None) -> list[Fraction]:
    """Returns the factors by which the answer may be multiplied before the comparison.

    The list is empty if the units contradict each other.
    """
    if gold and answer and gold.kinds and answer.kinds:
        return [answer.factor / gold.factor] if gold.kinds == answer.kinds else []
    if PERCENT in (gold, answer):
        return [Fraction(1), PERCENT.factor if answer == PERCENT else 1 / PERCENT.factor]
    return [Fraction(1)]


def _read_label(label: object) -> str:
    if not isinstance(label, str | int | float) or isinstance(label, bool):
        raise ValueError(f"the label must be a number or LaTeX, not {label!r}")
    text = str(label)
    boxed = last_boxed(text)
    gold = text if boxed is None else boxed
    if not gold.strip():
        raise ValueError("the label is empty")
    return gold
