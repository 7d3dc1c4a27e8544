"""Checks that installed packages have versions that this package supports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform as python
import subprocess
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.doctor.findings import Finding, judged
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind

PACKAGE = "megatron-rl"
OPTIONAL = {
    "transformer_engine": "the actor uses Megatron's local layers, which are slower on GPUs",
    "apex": "the actor does not use Apex's fused kernels",
}

_ASK = """
import importlib.metadata as m
there = {d.metadata["Name"]: d.version for d in m.distributions()}
print(next((there[name] for name in (NAME, NAME + "-cpu") if name in there), ""))
"""


def check_server(rollout: RolloutSettings) -> Finding | None:
    """Check the engine's package in the environment that the engine is started from.

    Returns None if the engine runs in this package's process or elsewhere.
    """
    kind = engine_kind(rollout.engine)
    if not isinstance(kind, ServerKind) or rollout.server.urls:
        return None
    name = kind.package
    interpreter = str(rollout.server.python or sys.executable)
    where = f"rollout.server.python: {interpreter}"
    command = [interpreter, "-c", _ASK.replace("NAME", repr(name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except OSError as error:
        return Finding(
            name, "failure", f"{where}: {error.strerror}", "set it to the interpreter of the engine's environment"
        )
    version = done.stdout.strip()
    if not version:
        remedy = f"install {name} there, or set rollout.server.python to the interpreter of an environment that has it"
        return Finding(name, "failure", f"not installed ({where})", remedy)
    releases = SpecifierSet(kind.releases)
    known = releases.contains(version, prereleases=True)
    remedy = f"this project supports {releases}; other versions may work"
    return judged(name, known, f"{version} ({where})", remedy, otherwise="warning")


def check_versions(device: str) -> Iterator[Finding]:
    """Yields a finding for Python, one per required package that is missing or unsupported, and one for the rest."""
    new = sys.version_info >= (3, 11)
    yield judged("Python", new, python.python_version(), "use Python 3.11 or newer: make setup PYTHON=...")
    right: list[str] = []
    for requirement in _requirements():
        installed = _version(requirement.name)
        if installed is None:
            yield Finding(requirement.name, "failure", "not installed", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(installed, prereleases=True):
            found = f"{installed}; {requirement.specifier} is required"
            yield Finding(requirement.name, "failure", found, f"pip install '{requirement}'")
        else:
            right.append(f"{requirement.name} {installed}")
    main = [text for text in right if text.split()[0] in ("torch", "megatron-core", "transformers", "ray")]
    yield Finding("packages", "ok", f"{', '.join(main)} and {len(right) - len(main)} others have supported versions")
    if device != "cpu":
        for module, without in OPTIONAL.items():
            there = importlib.util.find_spec(module) is not None
            remedy = f"optional: without it {without}; NVIDIA's PyTorch images include it"
            yield judged(module, there, "installed" if there else "not installed", remedy, otherwise="warning")


def _requirements() -> list[Requirement]:
    declared = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    return [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
