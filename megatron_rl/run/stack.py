"""Checks the software under a run before anything starts: versions, driver, and NCCL on both sides of a broadcast."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from megatron_rl.config import Config
from megatron_rl.config.transport import transport_of
from megatron_rl.config.weight_sync import BROADCASTS
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.rollout.servers.package import interpreter_of
from megatron_rl.utils.environments import Environment, Mismatch, Question, driver_problem, nccl_problem
from megatron_rl.utils.versions import SUPPORTED, all_outside

ACTOR, ENGINE = "the actor", "the engine"


def check_stack(config: Config) -> None:
    """Raises UserError, with what to install, for versions that are not supported and environments that do not go
    together. `actor.device` must be decided."""
    if wrong := all_outside(SUPPORTED if config.actor.device != "cpu" else ("torch", "megatron-core")):
        raise UserError("\n".join(wrong))
    if faults := [str(fault) for fault in faults_of(config, environments_of(config)).values()]:
        raise UserError("\n".join(faults))


def environments_of(config: Config) -> dict[str, Environment]:
    """Returns the environments of the actor and, if the run starts servers, of the engine on this machine.

    Returns nothing on a CPU. Raises UserError if one of them has no working torch.
    """
    if config.actor.device == "cpu":
        return {}
    server = config.rollout.server
    asked = {ACTOR: Question(sys.executable, {})}
    starts_servers = isinstance(engine_kind(config.rollout.engine), ServerKind) and not server.urls
    if starts_servers and not config.rollout.replay:
        asked[ENGINE] = Question(interpreter_of(server), server.environment)
    return {name: question.answer() for name, question in asked.items()}


def faults_of(config: Config, environments: Mapping[str, Environment]) -> dict[str, Mismatch]:
    """Returns what keeps the environments from working on GPUs: the name of the check -> what does not fit."""
    faults = {
        f"driver for {name}": mismatch
        for name, environment in environments.items()
        if (mismatch := driver_problem(environment, name))
    }
    broadcast = ENGINE in environments and transport_of(config) in BROADCASTS
    if broadcast and (mismatch := nccl_problem(environments[ACTOR], environments[ENGINE])):
        faults["NCCL of both sides"] = mismatch
    return faults
