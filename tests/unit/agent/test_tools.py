"""Tools: a calculator, Python that keeps its names, and the answers to calls that a policy wrote wrongly."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from megatron_rl.agent.messages import MALFORMED, answer_of
from megatron_rl.agent.model import call_tool, schema_of
from megatron_rl.agent.tools import PythonTool, calculator
from megatron_rl.config.reward import CodeSettings


@pytest.mark.parametrize(
    ("expression", "result"),
    [("(3 + 4) * 2", "14"), ("-7 // 2", "-4"), ("1 / 4", "0.25"), ("6 / 3", "2"), ("2**10", "1024")],
)
def test_the_calculator_computes(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize("expression", ["__import__('os')", "x", "9**9**9", "1 +", "[1]", "'a' * 9", "1" * 2000, "1/0"])
def test_the_calculator_refuses_what_is_not_arithmetic(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError, ArithmeticError)):
        calculator(expression)


def python(*codes: str, **settings: Any) -> list[str]:
    async def run() -> list[str]:
        async with PythonTool(CodeSettings(**settings)) as box:
            return [await box.python(code) for code in codes]

    return asyncio.run(run())


def test_python_keeps_its_names_from_call_to_call() -> None:
    answers = python(
        "x = 6", "def f(y):\n    return x * y", "print('so')\nf(7)", "1 / 0", "x", "raise SystemExit(2)", "x"
    )
    assert answers[:3] == ["", "", "so\n42\n"]
    assert answers[3:] == ["ZeroDivisionError: division by zero\n", "6\n", "SystemExit: 2\n", "6\n"]


def test_python_is_in_the_sandbox(tmp_path: Any) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    reads, connects, writes = python(
        f"open({str(secret)!r}).read()", "import socket\nsocket.socket()", "open('note', 'w').write('ab')"
    )
    assert reads.startswith("PermissionError") and connects.startswith("PermissionError")
    assert writes == "2\n"


def test_code_that_never_ends_or_ends_the_process_costs_the_names_only() -> None:
    answers = python("x = 1", "while True: pass", "x", "import os\nos._exit(1)", "2", test_seconds=1.0)
    assert answers[1] == "error: the code took more than 1 s; all names are gone"
    assert answers[2].startswith("NameError")
    assert answers[3:] == ["error: the code ended the process; all names are gone", "2\n"]


def test_tools_describe_themselves() -> None:
    async def describe() -> list[Any]:
        async with PythonTool() as box:
            return [schema_of(calculator)["function"], schema_of(box.python)["function"]]

    arithmetic, code = asyncio.run(describe())
    assert arithmetic["name"] == "calculator" and arithmetic["parameters"]["required"] == ["expression"]
    assert code["name"] == "python" and "Names stay defined" in code["description"]


def call(text: str) -> str:
    (written,) = answer_of(f"ab <tool_call>{text}</tool_call>", with_tools=True)["tool_calls"]
    return asyncio.run(call_tool([calculator], written))


def test_what_a_policy_calls_wrongly_is_an_observation() -> None:
    right: dict[str, Any] = {"name": "calculator", "arguments": {"expression": "2 + 3"}}
    assert call(json.dumps(right)) == "5"
    assert "there is no tool 'f'" in call(json.dumps(right | {"name": "f"}))
    assert "wrong arguments" in call(json.dumps(right | {"arguments": {"e": 1}}))
    assert "ZeroDivisionError" in call(json.dumps(right | {"arguments": {"expression": "1/0"}}))
    for malformed in ("{", "[]", "3", '{"name": 3, "arguments": {}}', '{"name": "calculator"}', json.dumps(right)[:-1]):
        assert "not JSON of the form" in call(malformed)
    assert answer_of("<tool_call>{</tool_call>", with_tools=True)["tool_calls"][0]["function"]["name"] == MALFORMED
    assert "tool_calls" not in answer_of("<tool_call>{", with_tools=True)
