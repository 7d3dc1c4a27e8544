"""A dataclass with arrays has no generated `==`: the truth value of a comparison of arrays is ambiguous."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.sources import parsed

ROOT = Path(__file__).parents[2]
ARRAYS = re.compile(r"\b(Array|Indices|Mask|Ids|NDArray|ndarray|Tensor|PolicyScores)\b")


def comparable_dataclasses_with_arrays(source: str) -> list[str]:
    """The names of dataclasses that have a field of arrays and would compare it."""
    return [
        node.name
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.ClassDef)
        for decorator in map(ast.unparse, node.decorator_list)
        if decorator.startswith("dataclass") and "eq=False" not in decorator
        if any(isinstance(item, ast.AnnAssign) and ARRAYS.search(ast.unparse(item.annotation)) for item in node.body)
    ]


def test_a_comparable_dataclass_with_arrays_is_found() -> None:
    body = "class A:\n    numbers: Indices | None = None\n"
    assert comparable_dataclasses_with_arrays(f"@dataclass(frozen=True)\n{body}") == ["A"]
    assert comparable_dataclasses_with_arrays(f"@dataclass(frozen=True, eq=False)\n{body}") == []


def test_no_dataclass_compares_arrays() -> None:
    files = [path for room in ("lpreg", "megatron_rl") for path in sorted((ROOT / room).rglob("*.py"))]
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := comparable_dataclasses_with_arrays(path.read_text(encoding="utf-8")))
    }
    assert found == {}
