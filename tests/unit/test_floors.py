"""Imports point downwards: floors.toml names the floors, and no two files import each other in a circle."""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.sources import parsed

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
    """Returns the modules of this repository that the source imports: at import, in functions, for type checking."""
    is_package = FILES.get(module, Path("x.py")).name == "__init__.py"
    package = module.removesuffix(".__init__") if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(parsed(source)):
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


def floor(module: str) -> int | None:
    """Returns the number of the module's floor; None if floors.toml does not name its room."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((FLOOR_OF[name] for name in names if name in FLOOR_OF), None)


FLOOR = {module: floor(module) for module in FILES}


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


def test_every_room_is_on_a_floor() -> None:
    assert [module for module, number in FLOOR.items() if number is None] == []


def test_no_import_points_upwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, imported in GRAPH.items()
        for other in sorted(imported)
        if (FLOOR[other] or 0) > (FLOOR[module] or 0)
    ]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
