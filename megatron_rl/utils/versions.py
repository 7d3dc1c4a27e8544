"""Versions that this release works with: one table for the start of a run, its ranks, doctor and the image.

The table has what decides on GPUs. `tests/unit/utils/test_versions.py` holds it to pyproject.toml, whose other bounds
are read from the metadata of the installed package. This module loads none of the packages.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

SUPPORTED = {"torch": ">=2.8", "megatron-core": ">=0.16.1,<0.20", "transformer-engine": ">=2.4"}
"""Package -> releases that work. `transformer-engine` is optional; tests/rehearsal runs the oldest and newest."""

DRIVERS = {12: 525, 13: 580}
"""Major version of CUDA -> oldest driver. Source: NVIDIA, CUDA Compatibility, Minor Version Compatibility, table 1."""

BASE_IMAGES = "nvcr.io/nvidia/pytorch:25.09-py3 or newer"
"""NVIDIA's images whose torch and Transformer Engine work. 25.06 has torch 2.8.0a0, which is older than 2.8."""


def installed(package: str) -> str | None:
    """Returns the installed version, or None if the package is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(version: str, releases: str) -> bool:
    """Returns whether a version is among the releases. A pre-release counts by its number: 2.8.0a0 comes before 2.8."""
    return SpecifierSet(releases).contains(version, prereleases=True)


def outside(package: str) -> str | None:
    """Returns why the installed version is not supported and what to install; None if it is, or none is installed."""
    version, releases = installed(package), SUPPORTED[package]
    if version is None or fits(version, releases):
        return None
    return f"{package} {version} is installed, but this release works with {releases}: {remedy(package)}"


def all_outside(packages: Iterable[str]) -> list[str]:
    """Returns what `outside` says about each package that is not supported."""
    return [problem for package in packages if (problem := outside(package))]


def remedy(package: str) -> str:
    """Returns how to install a supported version."""
    if package == "transformer-engine":
        install = f"pip install --no-build-isolation 'transformer-engine[pytorch]{SUPPORTED[package]}'"
        return f"{install}, or uninstall it, or use {BASE_IMAGES}"
    return f"pip install '{package}{SUPPORTED[package]}'"


def requirements() -> list[Requirement]:
    """Returns what this package, which must be installed, requires without extras."""
    declared = [Requirement(text) for text in importlib.metadata.requires("megatron-rl") or ()]
    return [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]


def oldest_driver(cuda: str) -> int:
    """Returns the oldest driver for programs that were built for this version of CUDA, such as "13.0"."""
    return DRIVERS.get(int(cuda.split(".")[0]), max(DRIVERS.values()))
