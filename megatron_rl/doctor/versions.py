"""Checks that installed packages have versions that this package supports."""

from __future__ import annotations

import platform as python
import sys
from collections.abc import Iterator

from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.doctor.findings import Finding, judged
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.rollout.servers.package import interpreter_of, server_version
from megatron_rl.utils.versions import SUPPORTED, fits, installed, remedy, requirements

OPTIONAL = {
    "transformer-engine": "the actor uses Megatron's local layers, which are slower on GPUs",
    "apex": "the actor does not use Apex's fused kernels",
    "flash-attn": "Transformer Engine's attention uses cuDNN or its own kernels",
}


def check_server(rollout: RolloutSettings) -> Finding | None:
    """Check the engine's package in the environment that the engine is started from.

    Returns None if the engine runs in this package's process or elsewhere.
    """
    kind = engine_kind(rollout.engine)
    if not isinstance(kind, ServerKind) or rollout.server.urls:
        return None
    name, where = kind.package, f"rollout.server.python: {interpreter_of(rollout.server)}"
    try:
        version = server_version(kind, rollout.server)
    except UserError as error:
        found, _, advice = str(error).rpartition("; ")
        return Finding(name, "failure", found, advice)
    other = f"this project supports {kind.releases}; other versions may work"
    return judged(name, fits(version, kind.releases), f"{version} ({where})", other, otherwise="warning")


def check_versions(device: str) -> Iterator[Finding]:
    """Yields a finding for Python, one per required package that is missing or unsupported, one for the rest, and on
    GPUs one per optional package."""
    new = sys.version_info >= (3, 11)
    yield judged("Python", new, python.python_version(), "use Python 3.11 or newer: make setup PYTHON=...")
    right: dict[str, str] = {}
    for requirement in requirements():
        name, version = requirement.name, installed(requirement.name)
        if version is None:
            yield Finding(name, "failure", "not installed", f"pip install '{requirement}'")
        elif not fits(version, str(requirement.specifier)):
            found = f"{version}; {requirement.specifier} is required"
            yield Finding(name, "failure", found, f"pip install '{requirement}'")
        else:
            right[name] = version
    main = [f"{name} {right[name]}" for name in ("torch", "megatron-core", "transformers", "ray") if name in right]
    yield Finding("packages", "ok", f"{', '.join(main)} and {len(right) - len(main)} others have supported versions")
    if device != "cpu":
        for name, without in OPTIONAL.items():
            yield _check_optional(name, without)


def _check_optional(name: str, without: str) -> Finding:
    version = installed(name)
    if name in SUPPORTED and version and not fits(version, SUPPORTED[name]):
        return Finding(name, "failure", f"{version}; {SUPPORTED[name]} is supported", remedy(name))
    missing = f"optional: without it {without}; NVIDIA's PyTorch images include it"
    return judged(name, version is not None, version or "not installed", missing, otherwise="warning")
