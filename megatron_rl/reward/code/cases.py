"""Test cases from a label. Expected outputs never enter the sandbox."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Program:
    """A program that reads `stdin` and must print `stdout`."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Call:
    """A function that must return `expected` for `arguments`."""

    function: str
    arguments: list[Any]
    expected: Any


@dataclass(frozen=True)
class Check:
    """Code that runs after the candidate's code in the same namespace and must not raise."""

    tests: str


Case = Program | Call | Check
_EXPECTED = (
    'expected an object {"inputs": [...], "outputs": [...]} (with "fn_name" for calls), or "tests": code, or a list of '
    "assert statements"
)


def read_cases(label: object) -> list[Case]:
    """Returns the test cases of a label, given as an object or as JSON text. Raises ValueError if it has none."""
    value = _decoded(label)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        return [Check("\n".join(value))]
    if not isinstance(value, dict):
        raise ValueError(f"the label is not a set of tests: {_EXPECTED}; found {str(label)[:80]!r}")
    if isinstance(value.get("tests"), str) and value["tests"].strip():
        return [Check(value["tests"])]
    inputs, outputs, name = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the label's inputs and outputs are not two lists of one length: {_EXPECTED}")
    pairs = list(zip(inputs, outputs, strict=True))
    if name is None or (isinstance(name, str) and not name.strip()):  # TACO has programs with an empty name
        return [Program(_text(given), _text(wanted)) for given, wanted in pairs]
    if not isinstance(name, str) or not all(isinstance(given, list) for given in inputs):
        raise ValueError('with "fn_name", the label\'s inputs must be lists of arguments')
    return [Call(name, given, wanted) for given, wanted in pairs]


def passes(case: Program | Call, output: str, value: Any) -> bool:
    """Returns whether the result is the expected one. Printed text is compared word by word."""
    if isinstance(case, Program):
        return output.split() == case.stdout.split()
    return _same(value, case.expected) or (  # APPS wraps the return value of a call in a list
        isinstance(case.expected, list) and len(case.expected) == 1 and _same(value, case.expected[0])
    )


def _same(value: Any, expected: Any) -> bool:
    """Compares two JSON values. Numbers may differ by the rounding of a float."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and _close(value, expected)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in expected)
    return bool(value == expected)


def _close(value: float, expected: float) -> bool:
    try:
        return abs(value - expected) <= 1e-6 * max(1.0, abs(expected))
    except OverflowError:  # an integer beyond every float
        return False


def _decoded(label: object) -> object:
    if not isinstance(label, str):
        return label
    try:
        return json.loads(label)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the label is not JSON: {error}; {_EXPECTED}") from error


def _text(value: Any) -> str:
    """Returns a program's input or output as text. Some data sets give it as a list of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"a program's input and output must be text, found {value!r}")
    return value
