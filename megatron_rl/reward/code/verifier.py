"""The code verifier: runs the last Python block of a response against the tests of the label."""

from __future__ import annotations

import re
import secrets
import textwrap

from megatron_rl.config.reward import RewardSettings
from megatron_rl.types import RewardResult, Sample

from .cases import Call, Case, Check, Program, passes, read_cases
from .sandbox import LONGEST_OUTPUT, Execution, Sandbox, check_sandbox

_FENCE = re.compile(r"^([ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(`{3,})[ \t]*([\w+-]*)([^\n`]*)$", re.MULTILINE)
"""Indentation, with the mark of a list item if there is one; the fence; the language; whatever follows."""
_INDENTATION = re.compile(r"^[ \t]+", re.MULTILINE)
_DEEPER = 3
"""A closing fence may be indented by this much more than the opening one, as in CommonMark. A docstring's fence is
deeper."""
_PYTHON = ("python", "python3", "py")


class CodeReward:
    """Scores 1 if the last complete block in Python passes every test, and 0 otherwise. See `last_block`.

    The constructor raises UserError if this machine has no working sandbox.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings.code
        check_sandbox(self._settings)

    def __call__(self, sample: Sample) -> RewardResult:
        """Raises ValueError for a label without tests."""
        cases = read_cases(sample.prompt.label)
        source = last_block(sample.text)
        if source is None:
            return RewardResult(0.0, None, "no code block")
        with Sandbox(self._settings, source) as sandbox:
            for number, case in enumerate(cases, start=1):
                if problem := _problem(sandbox, case):
                    return RewardResult(0.0, source, f"test {number} of {len(cases)}: {problem}")
        return RewardResult(1.0, source, "correct")


def last_block(text: str) -> str | None:
    """Returns the content of the last complete fenced block that is marked as Python, or else of the last one without a
    stated language, which may be the program's output if another block is marked.

    The block may be indented, as in a list; its indentation is removed.
    """
    marked, unmarked, opened = None, None, None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif _closes(fence, opened):
            block = _dedented(text[opened.end() + 1 : fence.start()], _width(opened))
            if opened[3].lower() in _PYTHON:
                marked = block
            elif not opened[3]:
                unmarked = block
            opened = None
    return unmarked if marked is None else marked


def _closes(fence: re.Match[str], opened: re.Match[str]) -> bool:
    bare = not (fence[1] + fence[3] + fence[4]).strip()
    return bare and len(fence[2]) >= len(opened[2]) and _width(fence) <= _width(opened) + _DEEPER


def _width(fence: re.Match[str]) -> int:
    return len(fence[1].expandtabs(4))


def _dedented(code: str, width: int) -> str:
    """Removes up to `width` columns of space from every line, and whatever all lines are indented by after that."""
    if width:
        code = _INDENTATION.sub(lambda space: space[0].expandtabs(4)[width:], code)
    first = next((line for line in code.split("\n") if line.strip()), "")
    return textwrap.dedent(code) if first[:1].isspace() else code


def _problem(sandbox: Sandbox, case: Case) -> str | None:
    """Returns why the candidate fails the test case, or None if it passes."""
    match case:
        case Program(stdin, _):
            done = sandbox.run("run", stdin=stdin)
            return done.failure or (None if passes(case, done.output, None) else f"wrong output{_cut(done)}")
        case Call(function, arguments, _):
            done = sandbox.run("call", request={"function": function, "arguments": arguments})
            return done.failure or (None if passes(case, "", done.value) else f"wrong result{_cut(done)}")
        case Check(tests):
            token = secrets.token_hex(16)  # unknown to a candidate that exits before the tests have finished
            done = sandbox.run("check", request={"tests": tests, "token": token})
            return done.failure or (None if done.value == token else "exited before the tests had finished")


def _cut(done: Execution) -> str:
    return f" (only {LONGEST_OUTPUT // 2**20} MiB are read)" if done.is_cut else ""
