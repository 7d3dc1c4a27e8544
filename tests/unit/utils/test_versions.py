"""The supported versions are those that the package declares, and a version outside is named with what to install."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_rl.utils import versions

ROOT = Path(__file__).parents[3]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
BOUNDS = {requirement.name: requirement.specifier for requirement in map(Requirement, DECLARED)}


def test_the_table_agrees_with_pyproject() -> None:
    for package, releases in versions.SUPPORTED.items():
        if package != "transformer-engine":
            assert BOUNDS[package] == SpecifierSet(releases)


def test_ray_knows_tokens() -> None:
    assert BOUNDS["ray"] == SpecifierSet(">=2.52"), "the first release with token authentication"


@pytest.mark.parametrize(
    ("package", "version", "supported"),
    [
        ("torch", "2.8.0a0+5228986c39.nv25.6", False),  # NVIDIA's 25.06
        ("torch", "2.8.0", True),
        ("torch", "2.13.0a0+8145d630e8.nv26.6.1", True),
        ("megatron-core", "0.16.0", False),
        ("megatron-core", "0.19.2", True),
        ("megatron-core", "0.20.1", False),
        ("transformer-engine", "1.13.0", False),
        ("transformer-engine", "2.16.0+4220403e", True),
    ],
)
def test_versions_are_judged_by_the_table(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, supported: bool
) -> None:
    """A pre-release counts by its number."""
    monkeypatch.setattr(versions, "installed", lambda _: version)
    problem = versions.outside(package)
    assert (problem is None) is supported
    if problem:
        assert f"{package} {version} is installed" in problem and "pip install" in problem


def test_a_missing_package_is_not_outside_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: None)
    assert versions.all_outside(versions.SUPPORTED) == []


def test_a_driver_follows_from_the_version_of_cuda() -> None:
    assert [versions.oldest_driver(cuda) for cuda in ("12.8", "13.0", "13.3")] == [525, 580, 580]
    assert versions.oldest_driver("14.0") == 580, "an unknown version needs at least the newest driver that is known"
