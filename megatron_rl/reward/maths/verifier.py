r"""The maths verifier: compares the last \boxed{} of a response with the label."""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_rl.types import RewardResult, Sample
from megatron_rl.utils.boxed import last_boxed

from .compare import same
from .reader import readings
from .text import compact, normalise

LONGEST_KEPT = 200
"""Characters of an answer that results and dumps keep."""
_MEMBER = re.compile(r"(\\?[a-zA-Z]+(?:_\{[^{}]*\})?'*) ?\\in(?![a-zA-Z])")
"""A name whose values are listed, as in `x\\in[0,1]`."""
HOPELESS = 10_000
"""Characters above which an answer is not even normalised."""
LONGEST = 600
"""Characters above which a label or an answer is only compared as a text."""


def verify_maths(sample: Sample) -> RewardResult:
    r"""Returns score 1 if the content of the last complete `\boxed{}` equals the label as mathematics, and 0 otherwise.

    The label is a number, plain LaTeX or LaTeX with its own box. Raises ValueError if the label is empty. A response
    without a complete box scores 0, truncated or not. Some comparisons never end, so the caller must limit the time, as
    `RewardPool` does by killing the process. The timeouts of math-verify are off: they need SIGALRM and would count a
    timeout as a wrong answer. docs/rewards.md states the conventions.
    """
    gold = read_label(sample.prompt.label)
    answer = last_boxed(sample.text)
    if answer is None:
        return RewardResult(0.0, None, "no box")
    detail = judge(gold, answer) if len(answer) <= HOPELESS else "answer too long"
    return RewardResult(1.0 if detail == "correct" else 0.0, answer[:LONGEST_KEPT], detail)


@lru_cache(maxsize=4096)
def judge(gold: str, answer: str) -> str:
    """Compares label and answer, and returns "correct" or the reason for score 0.

    Results are cached because the responses to one prompt share few distinct answers.
    """
    gold, answer = normalise(gold), normalise(answer)
    if not any(character.isalnum() for character in answer) and answer != gold and answer != r"\{\}":
        return "unreadable answer"
    if compact(gold) == compact(answer):
        return "correct"
    if max(len(gold), len(answer)) > LONGEST:
        return "answer too large to compare"
    if len({match[1] for text in (gold, answer) if (match := _MEMBER.match(text))}) > 1:
        return "wrong answer"
    from .algebra import TooLarge  # sympy takes a second to import; workers import it when they start

    try:
        right = any(same(label, given) for label in readings(gold) for given in readings(answer))
    except TooLarge:
        return "answer too large to compare"
    return "correct" if right else "wrong answer"


def read_label(label: object) -> str:
    """Returns the label as text, without its box. Raises ValueError if it is empty or neither number nor text."""
    if not isinstance(label, str | int | float) or isinstance(label, bool):
        raise ValueError(f"the label must be a number or LaTeX, not {label!r}")
    text = str(label)
    boxed = last_boxed(text)
    gold = text if boxed is None else boxed
    if not gold.strip():
        raise ValueError("the label is empty")
    return gold
