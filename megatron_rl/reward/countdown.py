"""The Countdown verifier. It has its own arithmetic, so that it also reveals errors in the task's generator."""

from __future__ import annotations

import re

from megatron_rl.types import RewardResult, Sample

LARGEST = 80
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
FILLERS = ("hmm", "so")
BETWEEN_ATTEMPTS = ("ok", "no", "wait", *FILLERS)

_NUMBER = r"(\d{1,9})"  # Python refuses to convert thousands of digits
LABEL = re.compile(f"{_NUMBER} {_NUMBER} {_NUMBER} > {_NUMBER}", re.ASCII)
_RESULT = "(?:=|calc)"  # with `calc`, a calculator has written the result
ATTEMPT = re.compile(f"{_NUMBER} ([-+*]) {_NUMBER} {_RESULT} {_NUMBER} ([-+*]) {_NUMBER} {_RESULT} {_NUMBER}", re.ASCII)


def verify_countdown(sample: Sample) -> RewardResult:
    """Returns score 1 if the last attempt solves the problem and is followed by the verdict `ok`, and 0 otherwise.

    The response must have ended by itself, and one filler (`hmm`, `so`) may follow the verdict. The verdict is part of
    the rule because policies otherwise drift to always answering `no`. Raises ValueError unless the label has the form
    `3 5 7 > 22`.
    """
    numbers, target = read_label(sample.prompt.label)
    words = sample.text.split()
    attempt = _last_attempt(words)
    detail = _unfinished(sample) or _judge_verdict(words) or _judge_attempt(attempt, numbers, target) or "correct"
    return RewardResult(1.0 if detail == "correct" else 0.0, attempt, detail)


def read_label(label: object) -> tuple[list[int], int]:
    match = LABEL.fullmatch(label) if isinstance(label, str) else None
    if match is None:
        raise ValueError(f"the Countdown label must look like '3 5 7 > 22', not {label!r}")
    *numbers, target = map(int, match.groups())
    return numbers, target


def _last_attempt(words: list[str]) -> str | None:
    """Returns the last run of words without a verdict, a retry or a filler."""
    end = len(words)
    while end and words[end - 1] in BETWEEN_ATTEMPTS:
        end -= 1
    start = end
    while start and words[start - 1] not in BETWEEN_ATTEMPTS:
        start -= 1
    return " ".join(words[start:end]) or None


def _unfinished(sample: Sample) -> str | None:
    reason = sample.response.finish_reason
    return None if reason == "stop" else "truncated" if reason == "length" else "aborted"


def _judge_verdict(words: list[str]) -> str | None:
    verdict = words[-2:-1] if words[-1:] and words[-1] in FILLERS else words[-1:]
    if verdict == ["ok"]:
        return None
    return "verdict is no" if verdict == ["no"] else "no verdict"


def _judge_attempt(attempt: str | None, numbers: list[int], target: int) -> str | None:
    if attempt is None:
        return "no attempt"
    match = ATTEMPT.fullmatch(attempt)
    if match is None:
        return "malformed attempt"
    x, first, y, z, second, w, result = match.groups()
    if not _holds(x, first, y, z) or not _holds(z, second, w, result):
        return "wrong arithmetic"
    if sorted(map(int, (x, y, w))) != sorted(numbers):
        return "wrong numbers"
    return None if int(result) == target else "wrong target"


def _holds(x: str, operator: str, y: str, result: str) -> bool:
    return OPERATIONS[operator](int(x), int(y)) == int(result) <= LARGEST
