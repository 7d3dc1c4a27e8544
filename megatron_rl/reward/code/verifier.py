"""The code verifier: runs the last Python block of a response against the tests of the label."""

from __future__ import annotations

import re
import secrets

from megatron_rl.config.reward import RewardSettings
from megatron_rl.types import RewardResult, Sample

from .cases import Call, Case, Check, Program, passes, read_cases
from .sandbox import Sandbox, check_sandbox

_FENCE = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_LANGUAGES = ("", "python", "python3", "py")


class CodeReward:
    """Scores 1 if the last complete ``` block passes every test, and 0 otherwise.

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
    """Returns the content of the last complete fenced block in Python or without a stated language."""
    found, opened = None, None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[1]:
            if opened[1].lower() in _LANGUAGES:
                found = text[opened.end() + 1 : fence.start()]
            opened = None
    return found


def _problem(sandbox: Sandbox, case: Case) -> str | None:
    """Returns why the candidate fails the test case, or None if it passes."""
    match case:
        case Program(stdin, _):
            done = sandbox.run("run", stdin=stdin)
            return done.failure or (None if passes(case, done.output, None) else "wrong output")
        case Call(function, arguments, _):
            done = sandbox.run("call", request={"function": function, "arguments": arguments})
            return done.failure or (None if passes(case, "", done.value) else "wrong result")
        case Check(tests):
            token = secrets.token_hex(16)  # unknown to a candidate that exits before the tests have finished
            done = sandbox.run("check", request={"tests": tests, "token": token})
            return done.failure or (None if done.value == token else "exited before the tests had finished")
