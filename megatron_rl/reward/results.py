"""What a reward may return, as a `RewardResult` that every table can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from megatron_rl.types import Outcome, RewardResult

EXCERPT = 80
"""Number of characters of a wrong value that a message shows."""
ACCEPTED = "return a number, a dict with a number under 'score', or a RewardResult"


def result_of(value: Any) -> RewardResult:
    """Returns the result that a reward's return value stands for.

    Accepted are a bool, int or float, a scalar of numpy or torch (no dimensions), a dict with such a `score` and
    optionally `answer` and `detail`, and a `RewardResult`. Raises TypeError for anything else, and ValueError for a
    score that is not finite.
    """
    if isinstance(value, RewardResult):
        if value.outcome not in get_args(Outcome):
            raise ValueError(f"the outcome is {shown(value.outcome)}, not one of {', '.join(get_args(Outcome))}")
        score = _number(value.score) if value.outcome == "score" else 0.0
        return RewardResult(score, _answer(value.answer), plain_text(value.detail), value.outcome)
    if isinstance(value, Mapping):
        if "score" not in value:
            raise TypeError(f"the reward returned {shown(value)}, which has no 'score'; {ACCEPTED}")
        return RewardResult(_number(value["score"]), _answer(value.get("answer")), plain_text(value.get("detail", "")))
    return RewardResult(_number(value))


def plain_text(value: object) -> str:
    """Returns the value as text that can be written to a file. Lone surrogates, which cannot, become question marks."""
    return str(value).encode(errors="replace").decode()


def shown(value: object) -> str:
    """Returns the type of a value and the beginning of its text, for messages."""
    return f"{type(value).__name__} {plain_text(repr(value))[:EXCERPT]}"


def _number(value: Any) -> float:
    scalar = value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        scalar = value.item()
    if not isinstance(scalar, int | float):  # bool is an int
        raise TypeError(f"the score is {shown(value)}, not a number; {ACCEPTED}")
    try:
        score = float(scalar)
    except OverflowError:
        raise ValueError(f"the score is {shown(value)}, which is too large") from None
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}")
    return score


def _answer(value: object) -> str | None:
    return None if value is None else plain_text(value)
