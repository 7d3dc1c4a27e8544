r"""The maths verifier: the last \boxed{} of a response against the label, compared by math-verify."""

from __future__ import annotations

import logging

from math_verify import parse, verify

from megatron_rl.types import RewardResult, Sample

BOX = r"\boxed{"

# math-verify warns once per process that its timeouts are off, as they are here on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify_maths(sample: Sample) -> RewardResult:
    r"""1 if the last complete `\boxed{}` equals the label as mathematics, else 0.

    The label is a number, plain LaTeX or LaTeX with its own box; ValueError if there is nothing in it. A response
    without a box scores 0 however it ends. Some comparisons never end (`5^{5^{5^5}}` does not): the caller bounds the
    time, as `RewardPool` does by ending the process. math-verify's own timeouts are off: they need the main thread
    and SIGALRM, and would count a timeout as a wrong answer.
    """
    gold = _parse(_read_label(sample.prompt.label))
    answer = last_boxed(sample.text)
    if answer is None:
        return RewardResult(0.0, None, "no box")
    parsed = _parse(answer)
    if not parsed:
        return RewardResult(0.0, answer, "unreadable answer")
    # The order matters: math-verify lets the label decide what a pair, an interval or an equation means.
    correct = verify(gold, parsed, timeout_seconds=None)
    return RewardResult(1.0 if correct else 0.0, answer, "correct" if correct else "wrong answer")


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, or None. Escaped braces (`\{`) do not count as nesting."""
    end = len(text)
    while (start := text.rfind(BOX, 0, end)) >= 0:
        content = _to_closing_brace(text, start + len(BOX))
        if content is not None:
            return content
        end = start
    return None


def _to_closing_brace(text: str, start: int) -> str | None:
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None


def _read_label(label: object) -> str:
    if not isinstance(label, str | int | float) or isinstance(label, bool):
        raise ValueError(f"the label must be a number or LaTeX, not {label!r}")
    text = str(label)
    boxed = last_boxed(text)
    gold = text if boxed is None else boxed
    if not gold.strip():
        raise ValueError("the label is empty")
    return gold


def _parse(latex: str) -> list[object]:
    """math-verify's reading (an expression and its text, or the text alone). Boxed, as it reads bare LaTeX poorly."""
    return list(parse(f"{BOX}{latex.strip().rstrip('.')}}}", parsing_timeout=None))
