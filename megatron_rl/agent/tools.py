"""Tools that come with the product: a calculator, and Python in the sandbox of the code reward."""

from __future__ import annotations

import ast
import asyncio
import atexit
import json
import operator
import secrets
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rl.agent.messages import well_formed
from megatron_rl.config.reward import CodeSettings
from megatron_rl.reward.code.sandbox import check_sandbox, invocation
from megatron_rl.utils.files import owned_folder, remove_tree

LARGEST_EXPONENT = 1000
LONGEST_EXPRESSION = 1000
CALLS = 100
"""Calls of the Python tool in a rollout for which its limit of processor time is meant."""
LONGEST_ANSWER = 2**20
"""Bytes of an answer of the sandbox."""


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers, the operators + - * / // % ** and parentheses, such as (3 + 4) * 2.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {LONGEST_EXPRESSION} characters")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > LARGEST_EXPONENT or abs(base) > 10**LARGEST_EXPONENT:
        raise ValueError("the power is too large")
    return base**exponent


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")


class PythonTool:
    """Python with one namespace for all calls of a rollout, in a process without network, other files or processes.

    A context manager: `async with PythonTool() as box:` and then `tools=[box.python]`. The process starts with the
    first call. A call that takes longer than `settings.test_seconds`, or is cancelled, ends the process; the next call
    starts a new one. Calls at the same time run one after another.
    """

    def __init__(self, settings: CodeSettings | None = None) -> None:
        self._settings = settings or CodeSettings()
        self._process: asyncio.subprocess.Process | None = None
        self._lock, self._closed = asyncio.Lock(), False

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(dir=_folder_of_process()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        await self._end()
        async with self._lock:  # a call that was about to start a process ends first
            await self._end()
        remove_tree(self._folder)

    async def python(self, code: str) -> str:
        """Runs Python code and returns what it prints. Names stay defined for later calls.

        Args:
            code: The code. The value of a last line that is an expression is shown too.
        """
        async with self._lock:
            if self._closed:
                raise RuntimeError("the Python tool is closed: call it inside its `async with`")
            process = self._process or await self._start()
            try:
                async with asyncio.timeout(self._settings.test_seconds):
                    return await _answered(process, code)
            except TimeoutError:
                problem = f"took more than {self._settings.test_seconds:g} s"
            except (ValueError, ConnectionError):  # the process ended, or wrote an endless line as its answer
                problem = "ended the process"
            except BaseException:  # the call is cancelled, and its answer must not be the next one's
                await self._end()
                raise
            await self._end()
            return f"error: the code {problem}; all names are gone"

    async def _start(self) -> asyncio.subprocess.Process:
        seconds = CALLS * self._settings.test_seconds
        await asyncio.to_thread(_check, self._settings)
        command, options = invocation(self._settings, self._folder, "session", seconds)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, limit=LONGEST_ANSWER, **options
        )
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process and process.returncode is None:
            process.kill()
            await process.wait()


async def _answered(process: asyncio.subprocess.Process, code: str) -> str:
    """Returns what the code prints. Lines without the token of this call are not its answer.

    Raises ConnectionError if the process ends, and ValueError for a line longer than LONGEST_ANSWER.
    """
    assert process.stdin and process.stdout
    token = secrets.token_hex(16)
    process.stdin.write(json.dumps([token, code]).encode() + b"\n")
    await process.stdin.drain()
    mark = f"{token} ".encode()
    while line := await process.stdout.readline():
        if line.startswith(mark):
            return well_formed(str(json.loads(line.removeprefix(mark))))
    raise ConnectionError("the process has ended")


@cache
def _folder_of_process() -> Path:
    """The parent of all sandboxes of this process. If the process is killed, the next one removes the folder."""
    folder = owned_folder("megatron-rl-tools-", Path(tempfile.gettempdir()))
    atexit.register(remove_tree, folder)
    return folder


_checked: set[str] = set()


def _check(settings: CodeSettings) -> None:
    """Raises UserError if this machine has no working sandbox; looks once."""
    key = settings.model_dump_json()
    if key not in _checked:
        check_sandbox(settings)
        _checked.add(key)
