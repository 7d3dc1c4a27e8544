"""Checks, before anything starts or is written, that this machine has what a configuration asks for."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.kind import BUILT_IN, SETTING, ServerKind, engine_kind
from megatron_rl.rollout.servers.package import server_version
from megatron_rl.utils.import_path import import_object

if TYPE_CHECKING:
    from megatron_rl.config import Config
    from megatron_rl.parallel.placement import Placement


def check_trackers(config: Config) -> None:
    """Raises UserError if a service for metrics is configured whose package is not installed."""
    settings = config.observability
    asked = {name: getattr(settings, name) is not None for name in ("wandb", "mlflow", "trackio")}
    packages = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
    missing = [name for name, wanted in asked.items() if wanted and importlib.util.find_spec(name) is None]
    if missing:
        lines = (
            f"observability.{name} is given, but the package {name} is not installed: pip install {packages[name]}, or "
            f"leave the key out"
            for name in missing
        )
        raise UserError("\n".join(lines))


def check_engine(config: Config) -> None:
    """Raises UserError if an engine of the user's own cannot be imported, or a server is not installed where the run
    starts it. A run that replays rollouts has no engine."""
    if config.rollout.replay:
        return
    kind = engine_kind(config.rollout.engine)
    if config.rollout.engine not in BUILT_IN:
        servers = (kind.command, kind.server) if isinstance(kind, ServerKind) else ()
        for path in (kind.engine, *servers):
            import_object(path, SETTING)
    if isinstance(kind, ServerKind) and not config.rollout.server.urls:
        server_version(kind, config.rollout.server)


def check_gpus(placement: Placement) -> None:
    """Raises UserError if the run is for GPUs and this machine, on which it would start Ray, has too few of them.

    With RAY_ADDRESS, the nodes of that Ray count; `cluster/runtime.py` asks it.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    if len(placement.nodes) > 1:
        raise UserError(
            f"cluster.nodes: this run needs {len(placement.nodes)} nodes, but RAY_ADDRESS names no Ray that has them: "
            "start Ray with `ray start` on each, or submit what `megatron-rl slurm` writes"
        )
    if not placement.on_gpu:
        return
    import torch

    needed, found = placement.gpus(placement.nodes[0]), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= needed:
        return
    build = "" if torch.version.cuda else f"; torch {torch.__version__} is built without CUDA"
    raise UserError(
        f"actor.device: cuda is set, and {needed} GPUs are needed (actor ranks and engines), but torch finds {found} "
        f"on this machine{build}. Use actor.device=cpu, fewer ranks and engines, or a machine with GPUs; "
        "`megatron-rl doctor` says what is missing"
    )
