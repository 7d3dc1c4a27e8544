"""Tests of the code verifier: correct and wrong programs, and the restrictions of the sandbox."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.reward import CodeSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import RewardPool
from megatron_rl.reward.code import CodeReward, jail
from megatron_rl.reward.code.sandbox import check_sandbox
from megatron_rl.reward.code.verifier import last_block
from megatron_rl.types import RewardResult, Sample

MakeSample = Callable[..., Sample]
SUM = {"inputs": ["3 4\n", "10 -2\n"], "outputs": ["7\n", "8"]}
CALLS = {"fn_name": "add", "inputs": [[3, 4], [0.1, 0.2]], "outputs": [7, [0.3]]}
ASSERTS = ["assert add(1, 1) == 2", "assert add(-1, 1) == 0"]
RIGHT = "def add(a, b):\n    print('noise')\n    return a + b"


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    """A verifier whose time limit no program reaches that ends by itself, however busy the machine is."""
    return CodeReward(RewardSettings(name="code", code=CodeSettings(test_seconds=300.0, memory_mb=256)))


@pytest.fixture(scope="module")
def impatient_reward() -> CodeReward:
    """A verifier for programs that never end."""
    return CodeReward(RewardSettings(name="code", code=CodeSettings(test_seconds=1.0, memory_mb=256)))


Grade = Callable[[Any, str], RewardResult]


def grade_with(reward: CodeReward, make_sample: MakeSample) -> Grade:
    def grade(label: Any, source: str) -> RewardResult:
        return reward(make_sample(f"Like this:\n```python\n{textwrap.dedent(source)}\n```\n", label))

    return grade


@pytest.fixture
def grade(reward: CodeReward, make_sample: MakeSample) -> Grade:
    return grade_with(reward, make_sample)


@pytest.fixture
def grade_impatiently(impatient_reward: CodeReward, make_sample: MakeSample) -> Grade:
    return grade_with(impatient_reward, make_sample)


@pytest.mark.parametrize("label", [SUM, json.dumps(SUM)])
def test_a_program_with_the_expected_output_is_correct(grade: Grade, label: Any) -> None:
    assert grade(label, "a, b = map(int, input().split())\nprint(a + b)").detail == "correct"


@pytest.mark.parametrize("label", [CALLS, ASSERTS, {"tests": "\n".join(ASSERTS)}])
def test_a_function_with_the_expected_results_scores_1(grade: Grade, label: Any) -> None:
    assert grade(label, RIGHT).score == 1.0


def test_floats_in_a_dictionary_may_differ_by_rounding(grade: Grade) -> None:
    label = {"fn_name": "f", "inputs": [[]], "outputs": [{"x": [0.3], "y": {"z": 1.5}}]}
    assert grade(label, "def f(): return {'x': [0.1 + 0.2], 'y': {'z': 1.5}}").detail == "correct"
    for wrong in ("{'x': [0.31], 'y': {'z': 1.5}}", "{'x': [0.3]}", "{'x': [0.3], 'y': {'z': 1.5}, 'w': 1}"):
        assert grade(label, f"def f(): return {wrong}").detail == "test 1 of 1: wrong result"


NUMPY = """
    class int64:  # numpy is not in every installation; its scalars and arrays have this method
        def tolist(self): return 3
    def f(): return [int64()]
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): return range(3)", [0, 1, 2]),
        ("def f(): return {'a': deque([1, 2])}", {"a": [1, 2]}),
        ("def f(): return Fraction(1, 2), Fraction(4, 2)", [0.5, 2]),
        ("def f(): return Decimal('0.25')", 0.25),
        ("def f(): return {1: 2}.values()", [2]),
        ("def f(): return array.array('i', [1, 2])", [1, 2]),
        (NUMPY, [3]),
    ],
)
def test_results_with_an_obvious_json_form_are_read(grade: Grade, source: str, expected: Any) -> None:
    label = {"fn_name": "f", "inputs": [[]], "outputs": [expected]}
    assert grade(label, source).detail == "correct"
    assert grade(label | {"outputs": [[7]]}, source).detail == "test 1 of 1: wrong result"


@pytest.mark.parametrize(
    "function",
    [
        "@lru_cache(None)\ndef g(n): return 0 if n == 0 else 1 + g(n - 1)",
        "def g(n): return 0 if n == 0 else 1 + sorted([n - 1], key=g)[0] * 0 + n - 1",
        "def g(n): return 0 if n == 0 else 1 + max(map(g, [n - 1]))",
    ],
)
def test_recursion_through_c_reaches_the_recursion_limit(grade: Grade, function: str) -> None:
    """Recursion through C takes two levels of Python 3.11's recursion limit at a time."""
    label = {"inputs": ["20000"], "outputs": ["20000"]}
    assert grade(label, f"{function}\nprint(g(int(input())))").detail == "correct"


@pytest.mark.parametrize(
    ("label", "source", "what"),
    [
        ({"inputs": [""], "outputs": ["1 " * 500]}, "print('1 ' * 600_000)", "wrong output"),
        ({"fn_name": "f", "inputs": [[]], "outputs": ["a"]}, "def f(): return 'a' * 1_200_000", "wrong result"),
    ],
)
def test_the_detail_says_that_an_output_is_too_long(grade: Grade, label: Any, source: str, what: str) -> None:
    assert grade(label, source).detail == f"test 1 of 1: {what} (too long: only its beginning is read)"


def test_an_output_as_long_as_the_expected_one_is_read(grade: Grade) -> None:
    assert grade({"inputs": [""], "outputs": ["1\n" * 1_500_000]}, "print('1 ' * 1_500_000)").score == 1.0
    call = {"fn_name": "f", "inputs": [[]], "outputs": [[1] * 700_000]}
    assert grade(call, "def f(): return [1] * 700_000").score == 1.0


def test_a_candidate_does_not_find_the_tests_and_their_token_in_a_file(grade: Grade) -> None:
    source = """
        import json, os
        token = json.load(open("request.json"))["token"]
        json.dump({"value": token}, open("result.json", "w"))
        os._exit(0)
    """
    assert "No such file or directory: 'request.json'" in str(grade(ASSERTS, source).detail)


def test_a_method_of_class_solution_scores_1(grade: Grade) -> None:
    assert grade(CALLS, "class Solution:\n    def add(self, a, b):\n        return a + b").score == 1.0


@pytest.mark.parametrize(
    ("label", "source", "detail"),
    [
        (SUM, "print(7)", "test 2 of 2: wrong output"),
        (SUM, "print(", "test 1 of 2: SyntaxError: '(' was never closed"),
        (SUM, "1 / 0", "test 1 of 2: ZeroDivisionError: division by zero"),
        (SUM, "x = bytearray(10**9)", "test 1 of 2: MemoryError"),
        (SUM, "import ctypes; ctypes.string_at(0)", "test 1 of 2: killed by SIGSEGV"),
        (SUM, "while True: print('x' * 10**6)", "test 1 of 2: OSError: [Errno 27] File too large"),
        (CALLS, "def add(a, b): return a", "test 1 of 2: wrong result"),
        (CALLS, "def ad(a, b): return a", "test 1 of 2: NameError: there is no function add"),
        (CALLS, "def add(a, b): return {a}", "test 1 of 2: TypeError: Object of type set is not JSON serializable"),
        (ASSERTS, "def add(a, b): return a", "test 1 of 1: AssertionError"),
        (ASSERTS, "import os; os._exit(0)", "test 1 of 1: exited before the tests had finished"),
        (ASSERTS, "raise SystemExit", "test 1 of 1: exited before the tests had finished"),
    ],
)
def test_a_wrong_program_scores_0_with_the_reason(grade: Grade, label: Any, source: str, detail: str) -> None:
    result = grade(label, source)
    assert (result.score, result.outcome, result.detail) == (0.0, "score", detail)


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(3600)"])
def test_an_endless_program_is_too_slow(grade_impatiently: Grade, source: str) -> None:
    result = grade_impatiently(SUM, source)
    assert (result.score, result.outcome, result.detail) == (0.0, "score", "test 1 of 2: too slow")


PRINT_SEVEN = {"inputs": [""], "outputs": ["7"]}
FORBIDDEN = {
    "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "fork": "import os; os.fork()",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "kill all processes": "import os; os.kill(-1, 9)",
    "limit the parent": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "read a file": "open({secret!r}).read()",
    "list a folder": "import os; os.listdir({folder!r})",
    "write a file": "open({target!r}, 'w')",
    "delete a file": "import os; os.remove({secret!r})",
    "other processes": "open('/proc/1/cmdline').read()",
    "become another user": "import os; os.setuid(12345)",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_sandbox_refuses_forbidden_operations(grade: Grade, tmp_path: Path, what: str) -> None:
    """The program prints 7 only if the operation fails. Outside the sandbox the operation works."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    line = FORBIDDEN[what].format(secret=str(secret), folder=str(tmp_path), target=str(tmp_path / "written"))
    result = grade(PRINT_SEVEN, f"try:\n    {line}\nexcept (OSError, ValueError):\n    print(7)")
    assert result.detail == "correct"
    assert secret.exists() and not (tmp_path / "written").exists()


def test_ordinary_operations_work_in_the_sandbox(grade: Grade) -> None:
    source = """
        from __future__ import annotations
        import dataclasses, json, math, os, tempfile, threading

        @dataclasses.dataclass
        class Pair:
            a: int
            b: int

        with open("scratch.txt", "w") as file:
            file.write("3")
        with tempfile.TemporaryDirectory() as folder:
            pass
        found = []
        thread = threading.Thread(target=lambda: found.append(int(open("scratch.txt").read())))
        thread.start()
        thread.join()
        print(Pair(found[0], 4).a + 4)
    """
    assert grade(PRINT_SEVEN, source).detail == "correct"


def test_the_sandbox_removes_its_files(
    grade_impatiently: Grade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    grade_impatiently(SUM, "import time; open('left', 'w').write('x'); time.sleep(60)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\na\n```\nthen\n```py\nb\n```", "b\n"),
        ("```python\na\n```\n```cpp\nint b;\n```", "a\n"),
        ("```python\na\n```\n```python\nunfinished", "a\n"),
        ("```python\na\n```\nOutput:\n```\n1\n```", "a\n"),
        ("```py\na\n```\n```Python3\nb\n```\n```\n1\n```\n```text\n2\n```", "b\n"),
        ("```\na\n```\n```\nb\n```", "b\n"),
        ("print(1)", None),
        ("```python\nprint(1)", None),
    ],
)
def test_the_last_complete_block_counts_and_blocks_marked_python_come_first(text: str, source: str | None) -> None:
    assert last_block(text) == source


def test_a_response_without_a_block_scores_0(reward: CodeReward, make_sample: MakeSample) -> None:
    assert reward(make_sample("print(7)", SUM)) == RewardResult(0.0, None, "no code block")


@pytest.mark.parametrize(
    "label",
    [
        None,
        7,
        "not json",
        "{}",
        [],
        [1],
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [1], "outputs": [2]},
        {"fn_name": "f", "inputs": ["1"], "outputs": [1]},
        {"tests": " "},
    ],
)
def test_a_label_without_tests_is_an_error(grade: Grade, label: Any) -> None:
    with pytest.raises(ValueError, match=r"label|program's input"):
        grade(label, "print(7)")


def test_a_candidate_dies_with_its_pool_worker(make_sample: MakeSample) -> None:
    settings = RewardSettings(name="code", workers=1, timeout_seconds=1.5, code=CodeSettings(test_seconds=60.0))
    text = "```python\nimport time\nopen('here', 'w')\ntime.sleep(60)\n```"
    with RewardPool(settings) as pool:
        results = pool.score([make_sample(text, SUM)])
        while jailed():
            time.sleep(0.05)
    assert [result.outcome for result in results] == ["timeout"]


def jailed() -> list[int]:
    mine = psutil.Process().children(recursive=True)
    orphans = [p for p in psutil.process_iter(["cmdline"]) if str(jail.__file__) in (p.info["cmdline"] or [])]
    return [process.pid for process in {*mine, *orphans} if runs_a_candidate(process)]


def runs_a_candidate(process: psutil.Process) -> bool:
    try:
        return str(jail.__file__) in process.cmdline()
    except (psutil.ZombieProcess, psutil.NoSuchProcess):  # the process may end while the test looks at it
        return False


@pytest.mark.parametrize(
    ("code", "required", "words"),
    [
        (jail.NO_LANDLOCK, True, r"reward\.code\.require_landlock=false"),
        (jail.NO_LANDLOCK, False, None),
        (jail.NO_SECCOMP, True, "reward.name=remote"),
        (1, True, "does not start"),
    ],
)
def test_a_machine_without_the_sandbox_features_is_refused(
    monkeypatch: pytest.MonkeyPatch, code: int, required: bool, words: str | None
) -> None:
    def start(*_: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"], stderr=subprocess.PIPE)

    monkeypatch.setattr("megatron_rl.reward.code.sandbox.start", start)
    settings = CodeSettings(require_landlock=required)
    if words is None:
        check_sandbox(settings)
        return
    with pytest.raises(UserError, match=words):
        check_sandbox(settings)
