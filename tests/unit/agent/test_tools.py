"""Tools: a calculator, Python that keeps its names, and the answers to calls that a policy wrote wrongly."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_rl.agent.messages import MALFORMED
from megatron_rl.agent.model import Model, call_tool, schema_of
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.agent.tool_calls import answer_of
from megatron_rl.agent.tools import PythonTool, calculator
from megatron_rl.config.agent import AgentSettings
from megatron_rl.config.reward import CodeSettings
from megatron_rl.training.metrics import agent_metrics
from megatron_rl.types import AgentResponse, Prompt
from tests.unit.agent.kit import TextEngines, sampling, tokenizer


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
    answers = python("x = 1", "while True: pass", "x", "import os\nos._exit(1)", "2", test_seconds=4.0)
    assert answers[1] == "error: the code took more than 4 s; all names are gone"
    assert answers[2].startswith("NameError")
    assert answers[3:] == ["error: the code ended the process; all names are gone", "2\n"]


def test_calls_at_the_same_time_share_one_process_and_get_their_own_answers() -> None:
    async def run() -> list[str]:
        async with PythonTool() as box:
            answers = await asyncio.gather(
                *(box.python(f"x{i} = {i}\nimport os\n(x{i}, os.getpid())") for i in range(4))
            )
            return [*answers, await box.python("x0 + x1 + x2 + x3, os.getpid()")]

    *answers, last = asyncio.run(run())
    (process,) = {answer.split(", ")[1] for answer in [*answers, last]}
    assert [answer.split(",")[0] for answer in answers] == ["(0", "(1", "(2", "(3"] and last == f"(6, {process}"


def test_a_cancelled_call_ends_the_process_and_its_output_is_no_other_call_s() -> None:
    async def run() -> list[str]:
        async with PythonTool() as box:
            await box.python("x = 1")
            call = asyncio.create_task(box.python("import time\ntime.sleep(600)\nprint('cancelled')"))
            await asyncio.sleep(0.1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            return [await box.python("2"), await box.python("x")]

    second, name = asyncio.run(run())
    assert second == "2\n" and name.startswith("NameError")


def test_code_that_writes_and_reads_the_standard_files_gets_its_own_answer() -> None:
    forged = (
        "import os\nfor i in range(20):\n    try: os.write(i, b'\"forged\"\\nx')\n    except OSError: pass\nprint('a')"
    )
    assert python(forged, "'b'", "os.read(0, 9)", "'c'") == ["a\n", "'b'\n", "b''\n", "'c'\n"]


def test_lone_surrogates_in_what_code_prints_are_replaced() -> None:
    assert python("print('a' + chr(0xd800))") == ["a?\n"]


def test_a_closed_tool_refuses_calls() -> None:
    async def run() -> None:
        async with PythonTool() as box:
            pass
        await box.python("1")

    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(run())


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


def test_calls_of_tools_and_their_errors_are_counted() -> None:
    """Calls are counted in what the policy writes, and in `use_tool`; errors in the results of this process's tools."""

    async def solve(model: Model, prompt: Prompt) -> float:
        assert await model.use_tool(calculator, expression="1+1") == "2"
        await model.use_tools([{"role": "user", "content": prompt.text}], [calculator])
        return 1.0

    def answers(text: str) -> str:
        if "<|im_start|>tool" in text:
            return "done"
        calls = ("1+1", "import os", "1/0")
        written = [json.dumps({"name": "calculator", "arguments": {"expression": call}}) for call in calls]
        return "".join(f"<tool_call>{call}</tool_call>" for call in [*written, "no JSON"])

    settings = AgentSettings(function="own:solve")
    with AgentRollouts(settings, solve, TextEngines(answers), tokenizer(), 10_000) as rollouts:
        ((response,),) = rollouts.generate([Prompt("p", (1,), "ab", None)], sampling())
    assert isinstance(response, AgentResponse)
    assert (response.tool_calls, response.tool_errors) == (5, 3)
    metrics = agent_metrics([response, replace(response, tool_calls=0, tool_errors=0)])
    assert (metrics["agent/tool_calls_mean"], metrics["agent/tool_errors_mean"]) == (2.5, 1.5)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_what_a_tool_returns_or_raises_has_no_lone_surrogate() -> None:
    def half(fails: bool) -> str:
        if fails:
            raise ValueError("\ud800")
        return "a\ud800"

    def answer(fails: bool) -> str:
        asked = {"function": {"name": "half", "arguments": json.dumps({"fails": fails})}}
        return asyncio.run(call_tool([half], asked))

    assert answer(fails=False) == "a?" and answer(fails=True) == "error: ValueError: ?"
    (written,) = answer_of('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', with_tools=True)[
        "tool_calls"
    ]
    assert written["function"]["arguments"] == '{"x": "?"}'


def test_what_a_policy_calls_wrongly_is_an_observation() -> None:
    right: dict[str, Any] = {"name": "calculator", "arguments": {"expression": "2 + 3"}}
    assert call(json.dumps(right)) == "5"
    assert "there is no tool 'f'" in call(json.dumps(right | {"name": "f"}))
    assert "wrong arguments" in call(json.dumps(right | {"arguments": {"e": 1}}))
    assert "ZeroDivisionError" in call(json.dumps(right | {"arguments": {"expression": "1/0"}}))
    for malformed in ("{", "[]", "3", '{"name": 3, "arguments": {}}', '{"name": "calculator"}', json.dumps(right)[:-1]):
        assert "not JSON of an object" in call(malformed)
    for deep in ("[" * 1000, "[" * 100_000, json.dumps(right | {"arguments": {"expression": nested(300)}})):
        assert "not JSON of an object" in call(deep)
    assert answer_of("<tool_call>{</tool_call>", with_tools=True)["tool_calls"][0]["function"]["name"] == MALFORMED
    assert "tool_calls" not in answer_of("<tool_call>{", with_tools=True)
