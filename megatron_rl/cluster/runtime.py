"""A Ray of our own on this machine, or the one that `RAY_ADDRESS` names; its nodes, and processes on them."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util import get_node_ip_address, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_rl.cluster.watch import ProgressDeadline, Watch, finished
from megatron_rl.errors import UserError
from megatron_rl.parallel.placement import Placement
from megatron_rl.utils import heartbeat
from megatron_rl.utils.files import redirect_output

OBJECT_STORE_BYTES = 256 * 2**20
BACKGROUND = "background"
CALLS_AT_A_TIME = 100_000
"""Of a process with coroutines: more than a run has requests under way, as a pause must not queue behind them. Ray's
own limit is 1000."""
NODES_TIMEOUT_SECONDS = 120
"""How long Ray may take to find the nodes: those of a job that has just begun may still be joining."""


_watch: Watch | None = None
"""Of this process's Ray, of which there is one at most."""


class Nodes:
    """The nodes of a placement, reserved."""

    def __init__(self, placement: Placement) -> None:
        """Raises UserError when Ray does not have them, after waiting for them a while."""
        self.placement = placement
        self.bundles = {node: index for index, node in enumerate(placement.nodes)}
        wanted = [_resources(placement.processes(node), placement.gpus(node)) for node in placement.nodes]
        self.rank_devices: list[str] = []
        """CUDA_VISIBLE_DEVICES of each actor rank, once they have started, where engines share their GPUs."""
        self.group = placement_group(wanted, strategy="STRICT_SPREAD")
        if not self.group.wait(NODES_TIMEOUT_SECONDS):
            remove_placement_group(self.group)
            raise UserError(f"Ray has not the nodes for this run.\n  needed: {wanted}\n  there: {_there()}")

    def strategy(self, node: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[node])

    @property
    def many(self) -> bool:
        return len(self.bundles) > 1

    def address(self, node: int) -> str:
        """Where its processes are reached by the others of this run."""
        if not self.many:
            return "127.0.0.1"
        name = placement_group_table(self.group)["bundles_to_node_id"][self.bundles[node]]
        return next(str(there["NodeManagerAddress"]) for there in ray.nodes() if there["NodeID"] == name)

    def engine_devices(self, number: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of an engine that shares its GPUs with the actor; None where it has GPUs of its own."""
        shared = self.placement.shared
        return ",".join(self.rank_devices[rank] for rank in shared[number]) if shared else None

    def close(self) -> None:
        remove_placement_group(self.group)


@contextmanager
def ray_runtime(placement: Placement, watch: Watch | None = None) -> Iterator[Nodes]:
    """Ray, and its nodes for this run, for as long as the block lasts. One started here ends with it.

    watch: looks after every wait for its processes. Raises UserError where there are too few nodes or GPUs.
    """
    global _watch
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Calls to an engine that is lost are made again elsewhere: nobody reads their errors, which Ray would print.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        if len(placement.nodes) > 1:
            raise UserError(
                f"cluster.nodes: this run needs {len(placement.nodes)} nodes, but RAY_ADDRESS names no Ray that has "
                "them: start one with `ray start` on each, or submit what `megatron-rl slurm` writes"
            )
        processes = sum(placement.processes(node) for node in placement.nodes)
        # "local": a Ray of its own, even where another one runs on this machine.
        options |= {"address": "local", "num_cpus": processes}
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(**options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"RAY_ADDRESS: {os.environ.get('RAY_ADDRESS')} does not let us in: {error}\nIs its head up, the port open, "
            "and are RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH the same here as where `ray start` was run?"
        ) from error
    try:
        needed = sum(placement.gpus(node) for node in placement.nodes)
        available = int(ray.cluster_resources().get("GPU", 0))
        if len(placement.nodes) == 1 and available < needed:
            raise UserError(
                f"{needed} GPUs are needed (actor ranks and engines), Ray has {available}: use actor.device=cpu?"
            )
        nodes = Nodes(placement)
        _watch = watch
        yield nodes
        nodes.close()
    finally:
        _watch = None
        ray.shutdown()


def _resources(processes: float, gpus: float) -> dict[str, float]:
    return {"CPU": processes} | ({"GPU": gpus} if gpus else {})


def _there() -> list[dict[str, float]]:
    return [
        {name: amount for name, amount in node["Resources"].items() if name in ("CPU", "GPU")}
        for node in ray.nodes()
        if node["Alive"]
    ]


class Hosted:
    """An object that lives in a Ray process. Its module is imported there: the driver stays light."""

    def __init__(
        self, target: str, arguments: tuple[Any, ...], log_file: Path, many_nodes: bool, driver_folder: Path
    ) -> None:
        redirect_output(log_file)
        if driver_folder.is_dir():  # where relative paths start; a node's own Ray was started anywhere
            os.chdir(driver_folder)
        # Ctrl-C is for the driver, which stops us in order. Python's own signal() works in the main thread only.
        ctypes.CDLL(None).signal(signal.SIGINT, ctypes.c_void_p(signal.SIG_IGN))
        self.address = get_node_ip_address() if many_nodes else "127.0.0.1"
        if many_nodes:  # gloo asks the host's name otherwise, which on many systems is a loopback address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(self.address))
        heartbeat.start(log_file.parent / heartbeat.FOLDER, log_file.stem, ray.get_runtime_context().get_node_id())
        module, name = target.split(":")
        self.object = getattr(importlib.import_module(module), name)(*arguments)

    def call(self, method: str, *arguments: Any) -> Any:
        heartbeat.notify("", call=method)
        try:
            return getattr(self.object, method)(*arguments)
        finally:
            heartbeat.notify("", call=heartbeat.IDLE)

    @ray.method(concurrency_group=BACKGROUND)
    def call_beside(self, method: str, *arguments: Any) -> Any:
        """In a thread of its own, while other calls go on one after another."""
        return getattr(self.object, method)(*arguments)

    def node_address(self) -> str:
        """Where processes on other nodes of this run reach this one."""
        return self.address

    def devices(self) -> str:
        """What Ray lets this process see of its node's GPUs."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")


class HostedAsync(Hosted):
    """One whose methods are coroutines: many calls at a time, on one event loop."""

    async def call(self, method: str, *arguments: Any) -> Any:
        return await getattr(self.object, method)(*arguments)


def _interface(address: str) -> str:
    """The network interface with this address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise RuntimeError(f"no network interface of this node has the address {address}, by which Ray knows it")


def host_process(
    target: str,
    arguments: tuple[Any, ...],
    *,
    log_file: Path,
    nodes: Nodes,
    node: int,
    gpus: int,
    cpus: int = 1,
    devices: str | None = None,
    hosted: type[Hosted] = Hosted,
) -> Any:
    """A process for one `package.module:Class`; one thread each on CPU, since several share a machine.

    devices: GPUs of another process, to use beside it; Ray is then asked for none.
    """
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    if devices is not None:
        gpus = 0
        environment |= {"CUDA_VISIBLE_DEVICES": devices, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    calls = {"max_concurrency": CALLS_AT_A_TIME} if hosted is HostedAsync else {}
    actor = ray.remote(concurrency_groups={BACKGROUND: 1})(hosted).options(  # type: ignore[call-overload]
        num_cpus=cpus,
        num_gpus=gpus,
        runtime_env={"env_vars": environment},
        scheduling_strategy=nodes.strategy(node),
        **calls,
    )
    return actor.remote(target, arguments, log_file.resolve(), nodes.many, Path.cwd())


def progress_deadline() -> ProgressDeadline | None:
    """For a wait that `results` does not do; None outside `ray_runtime`."""
    return ProgressDeadline(_watch) if _watch else None


def as_done(refs: list[ray.ObjectRef]) -> Iterator[ray.ObjectRef]:
    """Each as soon as it is done, well or not; `results` has what came out. Waits no longer than `results` would."""
    return finished(refs, progress_deadline())


def results(refs: list[ray.ObjectRef]) -> list[Any]:
    """`ray.get`, with a process's UserError or OSError raised as the error it was: Ray's copy lacks the errno.

    Within `ray_runtime` it does not wait for ever: UserError when no process makes progress any more.
    """
    try:
        return _watch.results(refs) if _watch else ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from error
        raise
