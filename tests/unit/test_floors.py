"""Imports point downwards: floors.toml names the floors, and no two files import each other in a circle."""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS: list[list[str]] = tomllib.loads((ROOT / "floors.toml").read_text(encoding="utf-8"))["floors"]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


FILES = {
    module_of(path): path
    for folder in ("lpreg", "megatron_rl", "tools", "examples", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(module: str, source: str) -> set[str]:
    """The modules of this repository that the source imports anywhere: at import, in functions, for type checking."""
    is_package = FILES.get(module, Path("x.py")).name == "__init__.py"
    package = module.removesuffix(".__init__") if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            known = next((m for m in (name, name.rpartition(".")[0]) if m in FILES), None)
            if known and known != module:
                found.add(known)
    return found


GRAPH = {module: imports_of(module, path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def floor(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (number := FLOOR_OF.get(".".join(parts[:end]))) is not None:
            return number
    raise AssertionError(f"{module} is on no floor: add its room to floors.toml")


def test_imports_of_every_kind_are_found() -> None:
    source = """
from typing import TYPE_CHECKING
import lpreg.aggregation
if TYPE_CHECKING:
    from megatron_rl.config import Config
def f():
    from .layout import Layout
"""
    found = imports_of("megatron_rl.parallel.process_groups", source)
    assert found == {"lpreg.aggregation", "megatron_rl.config", "megatron_rl.parallel.layout"}


@pytest.mark.parametrize("room", sorted({name for names in FLOORS for name in names}))
def test_no_import_points_upwards(room: str) -> None:
    mine = [module for module in FILES if floor(module) == FLOOR_OF[room] and f"{module}.".startswith(f"{room}.")]
    upwards = [
        f"{module} imports {other}" for module in mine for other in GRAPH[module] if floor(other) > floor(module)
    ]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
