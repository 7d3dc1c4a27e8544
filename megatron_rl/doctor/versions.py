"""Installed packages against the window that this package declares."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform as python
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from megatron_rl.doctor.finding import Finding, judged

PACKAGE = "megatron-rl"
OPTIONAL = {
    "transformer_engine": "layers are Megatron's local ones, slower on GPUs",
    "apex": "fused kernels of Apex are not used",
}


def check_versions(device: str) -> Iterator[Finding]:
    """A finding for Python, one for all required packages that are right, one for each that is not."""
    new = sys.version_info >= (3, 11)
    yield judged("Python", new, python.python_version(), "use Python 3.11 or newer: make setup PYTHON=...")
    right: list[str] = []
    for requirement in _requirements():
        installed = _version(requirement.name)
        if installed is None:
            yield Finding(requirement.name, "failure", "not installed", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(installed, prereleases=True):
            found = f"{installed}; {requirement.specifier} is needed"
            yield Finding(requirement.name, "failure", found, f"pip install '{requirement}'")
        else:
            right.append(f"{requirement.name} {installed}")
    main = [text for text in right if text.split()[0] in ("torch", "megatron-core", "transformers", "ray")]
    yield Finding("packages", "ok", f"{', '.join(main)} and {len(right) - len(main)} others as required")
    if device != "cpu":
        for module, without in OPTIONAL.items():
            there = importlib.util.find_spec(module) is not None
            remedy = f"optional: without it {without}; NVIDIA's PyTorch images have it"
            yield judged(module, there, "installed" if there else "not installed", remedy, otherwise="warning")


def _requirements() -> list[Requirement]:
    declared = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    return [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
