"""The supported versions are those that the package declares."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_rl.utils import versions

ROOT = Path(__file__).parents[3]


def test_the_table_agrees_with_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    named = {requirement.name: requirement.specifier for requirement in map(Requirement, declared)}
    for package, releases in versions.SUPPORTED.items():
        if package != "transformer-engine":
            assert named[package] == SpecifierSet(releases)


@pytest.mark.parametrize(("version", "supported"), [("2.8.0a0+nv25.06", False), ("2.8.0", True), ("2.9.0a0+nv", True)])
def test_a_pre_release_counts_by_its_number(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: version)
    assert (versions.outside("torch") is None) is supported


def test_a_missing_package_is_not_outside_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: None)
    assert versions.all_outside(versions.SUPPORTED) == []
