"""Checks of the environments of actor and engine on GPUs: torch, CUDA, driver and NCCL."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.config import Config
from megatron_rl.doctor.findings import Finding
from megatron_rl.errors import UserError
from megatron_rl.run.stack import environments_of, faults_of

PREFIX = "environment of "


def check_environments(config: Config) -> Iterator[Finding]:
    """Yields what torch finds in each environment on this machine, and what does not go together. Takes seconds."""
    try:
        environments = environments_of(config)
    except UserError as error:
        remedy = "repair it, or set rollout.server.python to the interpreter of an environment that has the engine"
        yield Finding("environments", "failure", str(error), remedy)
        return
    for name, environment in environments.items():
        yield Finding(f"{PREFIX}{name}", "ok", str(environment))
    for check, mismatch in faults_of(config, environments).items():
        yield Finding(check, "failure", mismatch.found, mismatch.remedy)
