"""Programs as models write them: without imports, in indented blocks, and with empty function names in the label."""

import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from megatron_rl.config.reward import CodeSettings, RewardSettings
from megatron_rl.reward.code import CodeReward
from megatron_rl.reward.code.verifier import last_block
from megatron_rl.types import Sample

SUM = {"inputs": ["3 4\n", "10 -2\n"], "outputs": ["7\n", "8"]}

Details = Callable[[Any, str], str]


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    return CodeReward(RewardSettings(name="code", code=CodeSettings(test_seconds=300.0, memory_mb=256)))


@pytest.fixture
def detail(reward: CodeReward, make_sample: Callable[..., Sample]) -> Details:
    def grade(label: Any, source: str) -> str:
        return reward(make_sample(f"```python\n{textwrap.dedent(source)}\n```", label)).detail

    return grade


TWO_SUM = """
    class Solution:
        def f(self, nums: List[int], target: int) -> Tuple[int, int]:
            seen = defaultdict(int)
            for i, x in enumerate(nums):
                if target - x in seen:
                    return seen[target - x], i
                seen[x] = i
"""
POSTPONED = "from __future__ import annotations\ndef f(a: Dict[str, List[int]]): return get_type_hints(f)['a'] and a"

WITHOUT_IMPORTS = [
    ("def f(a: List[int]) -> Optional[int]: return min(a)", [[3, 1]], 1),
    (TWO_SUM, [[2, 7, 11], 9], [0, 1]),
    ("def f(s): return Counter(s).most_common(1)[0][0]", ["abca"], "a"),
    ("def f(n): return sum(collections.deque(range(n))) + sum(deque([n]))", [4], 10),
    ("def f(a):\n    heapify(a)\n    return heapq.heappop(a)", [[3, 1, 2]], 1),
    ("def f(a, x): return bisect_left(a, x) + bisect.bisect(a, 1)", [[1, 3], 2], 2),
    ("@lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)", [50], 12586269025),
    ("def f(n): return len(list(product(range(n), repeat=2))) + next(itertools.count())", [3], 9),
    ("def f(a, b): return gcd(a, b) if math.floor(2.5) == sqrt(4) else inf", [12, 18], 6),
    ("def f(): return len(string.ascii_letters + ascii_lowercase)", [], 78),
    ("def f(s): return re.findall(r'[0-9]+', s)", ["a1b22"], ["1", "22"]),
    ("def f(n):\n    random.seed(0)\n    return randint(n, n)", [3], 3),
    ("def f(a): return copy.deepcopy(a) + deepcopy(a)", [[1]], [1, 1]),
    ("def f(a): return functools.reduce(operator.add, a) + reduce(add, a)", [[1, 2]], 6),
    ("def f(a: List): return datetime.datetime.fromtimestamp(0).microsecond + a[0] // sys.maxsize", [[1]], 0),
    ("@dataclass\nclass A:\n    x: int = 1\ndef f(): return A().x + int(Fraction(4, 2)) + int(Decimal(1))", [], 4),
    ("def f(a): return loads(dumps(a)) + [median(a), timedelta(days=1).days]", [[3]], [3, 3, 1]),
    (POSTPONED, [{"a": [1]}], {"a": [1]}),
]


@pytest.mark.parametrize(("source", "arguments", "expected"), WITHOUT_IMPORTS)
def test_a_function_may_lack_the_usual_imports(
    detail: Details, source: str, arguments: list[Any], expected: Any
) -> None:
    assert detail({"fn_name": "f", "inputs": [arguments], "outputs": [expected]}, source) == "correct"


@pytest.mark.parametrize(
    "source",
    [
        "data = sys.stdin.read().split()\nprint(sum(map(int, data)))",
        "def solve(xs: List[int]): print(reduce(operator.add, xs))\nsolve([int(x) for x in input().split()])",
        "for line in stdin:\n    stdout.write(str(sum(map(int, line.split()))))",
        "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    ],
)
def test_a_program_may_lack_the_usual_imports(detail: Details, source: str) -> None:
    assert detail(SUM, source) == "correct"


@pytest.mark.parametrize(
    ("name", "source", "arguments", "expected"),
    [
        ("power", "def power(a, b, m): return pow(a, b, m)", [3, 4, 5], 1),  # math.pow takes two arguments
        ("f", "product = 1\ndef f(n): return product + n", [2], 3),
        ("f", "def f(n):\n    count = n\n    return count", [2], 2),
        ("f", "def gcd(a, b): return 'mine'\ndef f(n): return gcd(n, n)", [2], "mine"),
        ("f", "from datetime import datetime\ndef f(): return datetime(2020, 1, 2).day", [], 2),
        ("product", "class Solution:\n    def product(self, n): return n * n", [2], 4),
        ("f", "def f(n): return n and 1 + f(n - 1)", [9000], 9000),
    ],
)
def test_the_names_of_the_candidate_and_of_python_come_first(
    detail: Details, name: str, source: str, arguments: list[Any], expected: Any
) -> None:
    assert detail({"fn_name": name, "inputs": [arguments], "outputs": [expected]}, source) == "correct"


def test_assert_tests_may_lack_the_imports_of_modules(detail: Details) -> None:
    label = ["assert math.isclose(root(4), 2)", "assert root(9) == 3"]
    assert detail(label, "def root(x: Union[int, float]): return sqrt(x)") == "correct"


@pytest.mark.parametrize("name", ["gcd", "reduce", "product", "heapify", "deepcopy", "add"])
def test_a_function_that_tests_call_must_be_the_candidates(detail: Details, name: str) -> None:
    assert f"name '{name}' is not defined" in detail([f"assert {name}"], f"# {name}")
    assert "no function" in detail({"fn_name": name, "inputs": [[6, 4]], "outputs": [2]}, f"# {name}")
    assert detail([f"assert {name}() == 5"], f"def {name}(): return 5") == "correct"


@pytest.mark.parametrize("name", ["", " ", None])
def test_an_empty_function_name_means_a_program(detail: Details, name: str | None) -> None:
    assert detail(SUM | {"fn_name": name}, "print(sum(map(int, input().split())))") == "correct"


DOCSTRING = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n'


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("1. First:\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
        ("      ```python\n      a\n    b\n      ```", "a\nb\n"),
        ("- ```python\n  a\n  ```", "a\n"),
        ("2) ```py\n   a\n   ```", "a\n"),
        ("\t```python\n\tif a:\n\t\tb\n\t```", "if a:\n    b\n"),
        ("```python\n    if a:\n        b\n```", "if a:\n    b\n"),
        ("  ```python\n\n  a\n\n  ```", "\na\n\n"),
        ("```python\na\n  ```", "a\n"),
        ("  ```python\n  a\n```", "a\n"),
        ("   ```python\na\n   ```", "a\n"),
        ("```python\n" + DOCSTRING + "```", DOCSTRING),
        ("  ```python\n" + textwrap.indent(DOCSTRING, "  ") + "  ```", DOCSTRING),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("Use ```print(1)``` here.\n```python\na\n```", "a\n"),
        ("  ```python\n  a\n  ```\n  ```\n  b", "a\n"),
        ("   ```cpp\n   a\n   ```", None),
        ("   ```python\n   a\n", None),
    ],
)
def test_indented_blocks_are_read(text: str, source: str | None) -> None:
    assert last_block(text) == source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("~~~python\na\n~~~", "a\n"),
        ("~~~\na\n~~~", "a\n"),
        ("  ~~~~ py\n  a\n  ~~~\n  ~~~~~", "a\n~~~\n"),
        ("~~~python\n" + DOCSTRING + "~~~", DOCSTRING),
        ("```python\na\n~~~\nb\n```", "a\n~~~\nb\n"),
        ("~~~python\na\n```", None),
        ("~~~cpp\na\n~~~", None),
        ("~~~text\n```python\na\n```\n~~~", None),
        ("Answer\n~~~~~~\n```python\na\n```", "a\n"),
    ],
)
def test_blocks_between_tildes_are_read(text: str, source: str | None) -> None:
    assert last_block(text) == source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("> ```python\n> if a:\n>     b\n> ```", "if a:\n    b\n"),
        (">```python\n>a\n>```\n", "a\n"),
        ("> > ~~~python\n> > a\n>>\n> > b\n> > ~~~", "a\n\nb\n"),
        ("> 1. ```python\n>    a\n>    ```", "a\n"),
        ("1. So:\n   > ```python\n   > a\n   > ```", "a\n"),
        ("> ```\n> a\n> ```\n\n```python\nb\n```", "b\n"),
        ("> ```python\n> a\n\n```python\nb\n```", "b\n"),
        ("> ```python\n> a\n\nText.\n\n> ```python\n> b\n> ```", "b\n"),
        ("> ```python\n> a\n```", None),
        ("```python\na\n> ```", None),
        ("> ```python\n> a\n> > ```", None),
        ("```python\n'''\n> ```\n'''\n```", "'''\n> ```\n'''\n"),
    ],
)
def test_blocks_in_quotes_are_read(text: str, source: str | None) -> None:
    assert last_block(text) == source


@pytest.mark.parametrize(
    "line", ["`" * 100_000 + "a`", "> " * 50_000, "~" * 100_000, ">" * 100_000 + "```", " " * 100_000]
)
def test_hostile_lines_are_no_blocks(line: str) -> None:
    assert last_block(f"{line}\na") is None


def test_a_program_in_an_indented_block_runs(reward: CodeReward, make_sample: Callable[..., Sample]) -> None:
    text = "1. The answer:\n\n   ```python\n   def f(n: List[int]):\n       return len(n)\n   ```\n\nDone."
    assert reward(make_sample(text, {"fn_name": "f", "inputs": [[[1]]], "outputs": [1]})).detail == "correct"
