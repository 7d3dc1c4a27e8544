"""The wheels: megatron-rl brings its examples, suites, templates and types; lpreg is a distribution of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lpreg
import megatron_rl

ROOT = Path(__file__).parents[2]


def wheel_of(source: Path, folder: Path) -> tuple[set[str], str]:
    """Builds a wheel from a copy of the tracked files below `source`. Returns the names in it, and its metadata."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((source / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        return names, archive.read(metadata).decode()


@pytest.mark.slow
def test_the_wheel_has_everything_that_a_user_without_a_clone_needs(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git")
    names, metadata = wheel_of(ROOT, tmp_path)
    tracked = {
        str(path.relative_to(ROOT)) for kind in ("yaml", "py") for path in (ROOT / "examples").rglob(f"*.{kind}")
    }
    assert {f"megatron_rl/{name}" for name in tracked} <= names
    python = {str(path.relative_to(ROOT)) for room in ("lpreg", "megatron_rl") for path in (ROOT / room).rglob("*.py")}
    assert python <= names
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "megatron_rl/models/configs").glob("*.json")}
    assert configs and configs <= names
    assert {"megatron_rl/py.typed", "lpreg/py.typed", "megatron_rl/evaluation/suites/paper.yaml"} <= names
    assert not any(name.startswith(("tests", "benchmarks", "tools", "examples", "lpreg/build")) for name in names)
    assert f"\nVersion: {megatron_rl.__version__}\n" in metadata


@pytest.mark.slow
def test_lpreg_is_a_wheel_of_its_own_that_needs_torch_only(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files comes from git")
    names, metadata = wheel_of(ROOT / "lpreg", tmp_path)
    python = {f"lpreg/{path.relative_to(ROOT / 'lpreg')}" for path in (ROOT / "lpreg").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python
    assert "lpreg/py.typed" in names
    assert re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) == ["torch>=2.8"]
    assert f"\nVersion: {lpreg.__version__}\n" in metadata


def test_lpreg_names_all_its_packages() -> None:
    settings = tomllib.loads((ROOT / "lpreg/pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lpreg").rglob("__init__.py")}
    assert set(settings["packages"]) == {".".join(folder.parts) for folder in folders if "build" not in folder.parts}
