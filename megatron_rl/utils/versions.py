"""The versions that this project supports: one table for doctor, the start of a run, the actor and the images.

Bounds of packages that pip installs with this one are in `pyproject.toml` and are read from the installed metadata.
This module adds the packages and the driver that come with GPUs. It loads none of these packages.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

PACKAGE = "megatron-rl"

TRANSFORMER_ENGINE = Requirement("transformer-engine>=2.4,<2.17")
"""The oldest release whose parameter names were compared with the weight map on a CPU, and the newest release line that
megatron-core 0.18 is built with (its pyproject.toml pins 2.16)."""

DRIVERS = {12: 525, 13: 580}
"""Major version of CUDA -> oldest driver. Source: NVIDIA, CUDA Compatibility, Minor Version Compatibility, table 1."""

BASE_IMAGES = "nvcr.io/nvidia/pytorch:25.09-py3 to 26.06-py3"
"""Images of NVIDIA whose torch and Transformer Engine are in the windows. 25.06 has torch 2.8.0a0, which PEP 440 orders
below 2.8."""

Misfit = Literal["absent", "too old", "too new"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A package outside its window."""

    requirement: Requirement
    found: str | None
    """The installed version; None if the package is not installed."""
    misfit: Misfit

    def __str__(self) -> str:
        have = f"is {self.found}" if self.found else "is not installed"
        return f"{self.requirement.name} {have}; {self.requirement.specifier} is supported: {self.remedy}"

    @property
    def remedy(self) -> str:
        """What to install."""
        if self.requirement.name in ("torch", TRANSFORMER_ENGINE.name):
            return f"install '{self.requirement}' for the CUDA of this driver, or use {BASE_IMAGES}"
        return f"pip install '{self.requirement}'"


def requirements() -> list[Requirement]:
    """Returns the packages that this package requires, with their bounds."""
    return applicable(importlib.metadata.requires(PACKAGE) or ())


def applicable(texts: Iterable[str]) -> list[Requirement]:
    """Returns the requirements that hold in this interpreter without extras."""
    declared = [Requirement(text) for text in texts]
    return [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]


def installed(name: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def problem(requirement: Requirement, found: str | None) -> Problem | None:
    """Returns what is wrong with the version `found` of a package, or None if it is supported.

    A pre-release is judged like any other version: 2.13.0a0 fits `>=2.8`, and 2.8.0a0 does not.
    """
    if found is None:
        return Problem(requirement, None, "absent")
    if requirement.specifier.contains(found, prereleases=True):
        return None
    ceilings = [bound for bound in requirement.specifier if bound.operator in ("<", "<=", "==")]
    above = any(Version(found) >= Version(bound.version.removesuffix(".*")) for bound in ceilings)
    return Problem(requirement, found, "too new" if above else "too old")


def problems(device: str) -> list[Problem]:
    """Returns the packages of this environment that are outside their windows.

    Transformer Engine counts on GPUs only, and only if it is installed: without it the actor uses Megatron's layers.
    """
    wanted = requirements()
    if device != "cpu" and installed(TRANSFORMER_ENGINE.name):
        wanted.append(TRANSFORMER_ENGINE)
    return [found for item in wanted if (found := problem(item, installed(item.name)))]


def oldest_driver(cuda: str) -> int:
    """Returns the oldest driver that runs a program built for this version of CUDA, such as "13.0"."""
    major = int(cuda.split(".")[0])
    return DRIVERS.get(major, max(DRIVERS.values()))
