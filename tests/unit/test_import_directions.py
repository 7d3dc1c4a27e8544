"""Rooms import only what they may, and files and functions stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sources import parsed

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("lpreg", "megatron_rl", "tools") for path in (ROOT / folder).rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 79

HEAVY = {"torch", "ray", "megatron", "transformers"}
# Rooms that a login node uses. Their functions may import torch; importing the room must not.
LIGHT = [
    "cli.py",
    "parallel/placement.py",
    "cluster/slurm.py",
    "commands",
    "config",
    "data",
    "doctor",
    "errors.py",
    "observability",
    "plan",
    "reward",
    "types.py",
]
# The only rooms that may import a library, anywhere in a file.
OWNERS = {"megatron": ["actor", "conversion", "models", "parallel"], "ray": ["cluster", "loop.py"]}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def in_rooms(path: Path, rooms: list[str]) -> bool:
    return any(path.is_relative_to(ROOT / "megatron_rl" / room) for room in rooms)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """Yields every node below; with `at_import` only nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if at_import and (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(child)):
            continue
        yield child
        yield from walk(child, at_import=at_import)


def imported(source: str, package: str = "", *, at_import: bool = False) -> set[str]:
    """Returns the absolute dotted names that `source`, a module of `package`, imports."""
    names: set[str] = set()
    for node in walk(parsed(source), at_import=at_import):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imports_of(path: Path, *, at_import: bool = False) -> set[str]:
    package = ".".join(path.parent.relative_to(ROOT).parts)
    return imported(path.read_text(encoding="utf-8"), package, at_import=at_import)


def tops(names: set[str]) -> set[str]:
    return {dotted.split(".")[0] for dotted in names}


def test_imports_of_every_kind_are_found() -> None:
    source = """
import megatron.core as mc
from ..actor import build
from . import here
if TYPE_CHECKING:
    import ray
class C:
    import numpy
def f():
    import torch.nn
"""
    light = {"megatron.core", "megatron_rl.actor.build", "megatron_rl.data.here", "numpy"}
    assert imported(source, "megatron_rl.data", at_import=True) == light
    assert imported(source, "megatron_rl.data") == light | {"ray", "torch.nn"}
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"lpreg", "megatron_rl"}


def test_lpreg_imports_torch_only() -> None:
    allowed = sys.stdlib_module_names | {"torch", "lpreg"}
    files = [path for path in SOURCES if name(path).startswith("lpreg/")]
    # An adapter may import the library that it is named after, and no other module imports an adapter.
    # TRL's trainer and callbacks are those of transformers.
    adapters = {name(path): {"trl", "transformers"} for path in files if path.stem.removeprefix("_").startswith("trl")}
    assert all(file.startswith("lpreg/integrations/") for file in adapters)
    # This module is imported only if Triton is installed.
    adapters["lpreg/statistics/kernels/row_kernels.py"] = {"triton"}
    strays = {
        name(path): found
        for path in files
        if (found := tops(imports_of(path)) - allowed - adapters.get(name(path), set()))
    }
    assert strays == {}
    outside = [path for path in SOURCES if not name(path).startswith("lpreg/integrations/")]
    assert [name(p) for p in outside if any(m.startswith("lpreg.integrations") for m in imports_of(p))] == []


def test_light_rooms_import_nothing_heavy() -> None:
    light = [path for path in SOURCES if in_rooms(path, LIGHT)]
    strays = {name(path): found for path in light if (found := tops(imports_of(path, at_import=True)) & HEAVY)}
    assert strays == {}


@pytest.mark.parametrize("library", OWNERS)
def test_only_its_owners_import_a_library(library: str) -> None:
    strays = [name(p) for p in SOURCES if library in tops(imports_of(p)) and not in_rooms(p, OWNERS[library])]
    assert strays == []


def test_no_room_imports_the_loop_or_the_command_line() -> None:
    """The command `train` alone starts the loop."""
    above = ("megatron_rl.loop", "megatron_rl.cli")
    strays = [
        name(path)
        for path in SOURCES
        if len(path.relative_to(ROOT).parts) > 2
        and name(path) != "megatron_rl/commands/train.py"
        and any(f"{dotted}.".startswith(f"{module}.") for dotted in imports_of(path) for module in above)
    ]
    assert strays == []


@pytest.mark.parametrize("room", [room.removesuffix(".py") for room in LIGHT])
def test_importing_a_light_room_loads_nothing_heavy(room: str) -> None:
    """This covers the whole chain of imports, not only those of the room's own files."""
    module = room.replace("/", ".")
    program = f"import sys, megatron_rl.{module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_files_are_short() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {file: lines for file, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{name(path)}:{node.lineno} {node.name}"] = lines
    assert long == {}
