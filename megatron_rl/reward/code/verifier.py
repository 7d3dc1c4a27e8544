"""The code verifier: runs the last Python block of a response against the tests of the label."""

from __future__ import annotations

import json
import re
import secrets
import textwrap
from collections.abc import Iterator

from megatron_rl.config.reward import RewardSettings
from megatron_rl.types import RewardResult, Sample

from .cases import Call, Case, Check, Program, passes, read_cases
from .sandbox import LONGEST_OUTPUT, Execution, Sandbox, check_sandbox

_FENCE = re.compile(
    r"^(?P<quote>(?:(?:[ \t]*>)+ ?)?)(?P<indent>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)"
    r"(?P<fence>`{3,}(?=[^`]*$)|~{3,})[ \t]*(?P<language>[\w+-]*)(?P<rest>.*)$"
)
"""Marks of block quotes; indentation, with the mark of a list item if there is one; the fence; the language; more."""
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

    The block may be indented, as in a list, or stand in a block quote; indentation and the marks of quotes are removed.
    """
    marked, unmarked = None, None
    for language, block in _blocks(text):
        if language.lower() in _PYTHON:
            marked = block
        elif not language:
            unmarked = block
    return unmarked if marked is None else marked


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields the language and the content of each complete block.

    A block in a quote ends, incomplete, with the quote. Tildes that nothing closes, as under a title, open none.
    """
    lines = text.split("\n")
    fences = [_FENCE.match(line) for line in lines]
    last_tildes = max((i for i, fence in enumerate(fences) if fence and "~" in fence[0] and _is_bare(fence)), default=0)
    opened, quoted, inside = None, re.compile(""), list[str]()
    for index, (line, fence) in enumerate(zip(lines, fences, strict=True)):
        if opened and not quoted.match(line):
            opened = None
        if opened is None:
            if fence and ("`" in fence["fence"] or index < last_tildes):
                opened, inside = fence, []
                depth = _depth(fence)
                quoted = re.compile(rf"(?:[ \t]*>){{{depth}}} ?" if depth else "")
        elif fence and _closes(fence, opened):
            yield opened["language"], _dedented("".join(f"{kept}\n" for kept in inside), _width(opened))
            opened = None
        else:
            inside.append(quoted.sub("", line, count=1))


def _closes(fence: re.Match[str], opened: re.Match[str]) -> bool:
    is_longer = fence["fence"].startswith(opened["fence"]) and _depth(fence) == _depth(opened)
    return _is_bare(fence) and is_longer and _width(fence) <= _width(opened) + _DEEPER


def _is_bare(fence: re.Match[str]) -> bool:
    return not (fence["indent"] + fence["language"] + fence["rest"]).strip()


def _depth(fence: re.Match[str]) -> int:
    return fence["quote"].count(">")


def _width(fence: re.Match[str]) -> int:
    return len(fence["indent"].expandtabs(4))


def _dedented(code: str, width: int) -> str:
    """Removes up to `width` columns of space from every line, and whatever all lines are indented by after that."""
    if width:
        code = _INDENTATION.sub(lambda space: space[0].expandtabs(4)[width:], code)
    first = next((line for line in code.split("\n") if line.strip()), "")
    return textwrap.dedent(code) if first[:1].isspace() else code


def _problem(sandbox: Sandbox, case: Case) -> str | None:
    """Returns why the candidate fails the test case, or None if it passes."""
    match case:
        case Program(stdin, stdout):
            done = sandbox.run("run", stdin=stdin, longest=_longest(stdout.encode()))
            return done.failure or (None if passes(case, done.output, None) else f"wrong output{_cut(done)}")
        case Call(function, arguments, expected):
            request = {"function": function, "arguments": arguments}
            done = sandbox.run("call", request=request, longest=_longest(json.dumps(expected).encode()))
            return done.failure or (None if passes(case, "", done.value) else f"wrong result{_cut(done)}")
        case Check(tests):
            token = secrets.token_hex(16)  # unknown to a candidate that exits before the tests have finished
            done = sandbox.run("check", request={"tests": tests, "token": token})
            return done.failure or (None if done.value == token else "exited before the tests had finished")


def _longest(expected: bytes) -> int:
    """Returns how much of an output is read: a right one may have other spaces, and numbers with more digits."""
    return max(LONGEST_OUTPUT, 2 * len(expected))


def _cut(done: Execution) -> str:
    return " (too long: only its beginning is read)" if done.is_cut else ""
