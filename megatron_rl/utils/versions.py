"""Versions of packages that this release works with. The actor checks its own at start, the doctor checks a machine.

`tests/unit/utils/test_versions.py` holds the table to pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from packaging.specifiers import SpecifierSet

SUPPORTED = {"torch": ">=2.8", "megatron-core": ">=0.16.1,<0.20", "transformer-engine": ">=2.4"}
"""Package -> releases that work. `transformer-engine` is optional; tests/rehearsal runs the oldest and newest."""

DISTRIBUTIONS = {"transformer-engine": ("transformer-engine", "transformer_engine")}
"""Names under which a package may be installed, if there is more than one."""


def installed(package: str) -> str | None:
    """Returns the installed version, or None if the package is missing."""
    for name in DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def outside(package: str) -> str | None:
    """Returns why the installed version is not supported and what to install; None if it is, or if none is installed.

    Pre-releases count by their number, so 2.8.0a0 is older than 2.8.
    """
    version, releases = installed(package), SUPPORTED[package]
    if version is None or SpecifierSet(releases).contains(version, prereleases=True):
        return None
    return f"{package} {version} is installed, but this release works with {releases}: {remedy(package)}"


def all_outside(packages: Iterable[str]) -> list[str]:
    """Returns what `outside` says about each package that is not supported."""
    return [problem for package in packages if (problem := outside(package))]


def remedy(package: str) -> str:
    """Returns the command that installs a supported version."""
    if package == "transformer-engine":
        return f"pip install --no-build-isolation 'transformer-engine[pytorch]{SUPPORTED[package]}', or uninstall it"
    return f"pip install '{package}{SUPPORTED[package]}'"
