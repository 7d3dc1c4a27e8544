"""A Ray of our own on this machine, or the one that `RAY_ADDRESS` names."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from megatron_rl.errors import UserError
from megatron_rl.observability.process_log import redirect_output

OBJECT_STORE_BYTES = 256 * 2**20


@contextmanager
def ray_runtime(processes: int, *, gpus: int) -> Iterator[None]:
    """Ray for as long as the block lasts; one started here ends with it. Raises UserError on too few GPUs."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"num_cpus": processes, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(**options)
    try:
        available = int(ray.cluster_resources().get("GPU", 0))
        if available < gpus:
            raise UserError(
                f"{gpus} GPUs are needed (actor ranks and engines), Ray has {available}: use actor.device=cpu?"
            )
        yield
    finally:
        ray.shutdown()


class Hosted:
    """An object that lives in a Ray process. Its module is imported there: the driver stays light."""

    def __init__(self, target: str, arguments: tuple[Any, ...], log_file: Path) -> None:
        redirect_output(log_file)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which stops us in order
        module, name = target.split(":")
        self.object = getattr(importlib.import_module(module), name)(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.object, method)(*arguments)


def host_process(target: str, arguments: tuple[Any, ...], *, log_file: Path, gpu: bool) -> Any:
    """A process for one `package.module:Class`; one thread each on CPU, since several share a machine."""
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    actor = ray.remote(Hosted).options(num_cpus=1, num_gpus=int(gpu), runtime_env={"env_vars": environment})
    return actor.remote(target, arguments, log_file.resolve())


def results(refs: list[ray.ObjectRef]) -> list[Any]:
    """`ray.get`, with a process's UserError or OSError raised as the error it was: Ray's copy lacks the errno."""
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from error
        raise
