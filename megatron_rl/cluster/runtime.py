"""Ray: started on this machine or found at `RAY_ADDRESS`; its nodes, and the processes of a run on them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import psutil
import ray
from ray import ObjectRef
from ray.util import get_node_ip_address, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_rl.cluster.local_ray import private_ray
from megatron_rl.cluster.watch import ProgressDeadline, Watch, finished
from megatron_rl.errors import UserError
from megatron_rl.parallel.placement import Placement
from megatron_rl.utils import heartbeat
from megatron_rl.utils.files import redirect_output
from megatron_rl.utils.home import provide_home

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

OBJECT_STORE_BYTES = 256 * 2**20
"""Size of Ray's object store on a machine without GPUs. With GPUs, batches have gigabytes, and Ray chooses a share of
the memory."""
BACKGROUND = "background"
CALLS_AT_A_TIME = 100_000
"""Concurrent calls of a process with coroutines: more than a run has requests under way, since a pause must not queue
behind them. Ray's own limit is 1000."""
NODES_TIMEOUT_SECONDS = 120
"""How long Ray may take to find the nodes: nodes of a job that has just begun may still be joining."""


_watch: Watch | None = None
"""Watch over this process's Ray; a process has at most one."""


class Nodes:
    """The nodes of a placement, reserved."""

    def __init__(self, placement: Placement) -> None:
        """Waits for the nodes; raises UserError if Ray still lacks them after NODES_TIMEOUT_SECONDS."""
        self.placement = placement
        self.bundles = {node: index for index, node in enumerate(placement.nodes)}
        wanted = [_resources(placement.processes(node), placement.gpus(node)) for node in placement.nodes]
        self.rank_devices: list[str] = []
        """CUDA_VISIBLE_DEVICES of each actor rank that has started, if engines share the ranks' GPUs."""
        self.group = placement_group(wanted, strategy="STRICT_SPREAD")
        if not self.group.wait(NODES_TIMEOUT_SECONDS):
            remove_placement_group(self.group)
            raise UserError(f"Ray lacks the nodes for this run.\n  needed: {wanted}\n  there: {_there()}")

    def strategy(self, node: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.bundles[node])

    @property
    def many(self) -> bool:
        return len(self.bundles) > 1

    def address(self, node: int) -> str:
        """Address at which other processes of this run reach processes on the node."""
        if not self.many:
            return "127.0.0.1"
        name = placement_group_table(self.group)["bundles_to_node_id"][self.bundles[node]]
        return next(str(there["NodeManagerAddress"]) for there in ray.nodes() if there["NodeID"] == name)

    @property
    def hosts(self) -> list[str]:
        """Names of the machines, in the order of the nodes."""
        names = {there["NodeID"]: str(there["NodeManagerHostname"]) for there in ray.nodes()}
        of_bundles = placement_group_table(self.group)["bundles_to_node_id"]
        return [names[of_bundles[index]] for index in self.bundles.values()]

    def engine_devices(self, number: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of an engine that shares its GPUs with the actor; None if it has GPUs of its own."""
        shared = self.placement.shared
        return ",".join(self.rank_devices[rank] for rank in shared[number]) if shared else None

    def close(self) -> None:
        remove_placement_group(self.group)


@contextmanager
def ray_runtime(placement: Placement, watch: Watch | None = None) -> Iterator[Nodes]:
    """Provides Ray and its nodes to this run while the block runs. If this function starts Ray, it also ends it.

    watch: bounds every wait for Ray's processes. Raises UserError if there are too few nodes or GPUs.
    """
    global _watch
    provide_home()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would start processes for work without an environment of its own, which a run does not have.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # Ray's GCS would keep a record of 100,000 calls for its state API: 20 MiB more per 1,000 small steps.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    # The run repeats the calls to a lost engine on another and does not read their errors, which Ray would print.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        if len(placement.nodes) > 1:
            raise UserError(
                f"cluster.nodes: this run needs {len(placement.nodes)} nodes, but RAY_ADDRESS names no Ray that has "
                "them: start Ray with `ray start` on each, or submit what `megatron-rl slurm` writes"
            )
        processes = sum(placement.processes(node) for node in placement.nodes)
        # "local": starts a Ray of its own, even if another one runs on this machine.
        options |= {"address": "local", "num_cpus": processes}
        options |= {"include_dashboard": False}
        if not placement.on_gpu:
            options["object_store_memory"] = OBJECT_STORE_BYTES
    try:
        with private_ray() as private:
            ray.init(**options, **private)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"RAY_ADDRESS: {os.environ.get('RAY_ADDRESS')} refuses the connection: {error}\nIs its head up, the port "
            "open, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH the same here as where `ray start` was run?"
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
    """An object that lives in a Ray process. The process imports what the object needs: the driver stays light."""

    def __init__(self, make: Callable[[], Any], log_file: Path, many_nodes: bool, driver_folder: Path) -> None:
        redirect_output(log_file)
        provide_home()
        if driver_folder.is_dir():  # relative paths start there; Ray on another node may have been started anywhere
            os.chdir(driver_folder)
        # Ctrl-C is for the driver, which stops this process in order. Python's signal() works in the main thread only.
        ctypes.CDLL(None).signal(signal.SIGINT, ctypes.c_void_p(signal.SIG_IGN))
        self.address = get_node_ip_address() if many_nodes else "127.0.0.1"
        if many_nodes:  # gloo otherwise takes the host's name, which on many systems is a loopback address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(self.address))
        heartbeat.start(log_file.parent / heartbeat.FOLDER, log_file.stem, ray.get_runtime_context().get_node_id())
        self.object = make()

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        heartbeat.notify("", call=method)
        try:
            return getattr(self.object, method)(*arguments, **named)
        finally:
            heartbeat.notify("", call=heartbeat.IDLE)

    @ray.method(concurrency_group=BACKGROUND)
    def call_beside(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Calls the method in a thread of its own, while other calls still run one after another."""
        return getattr(self.object, method)(*arguments, **named)

    def node_address(self) -> str:
        return self.address

    def devices(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")


class HostedAsync(Hosted):
    """A hosted object whose methods are coroutines: many calls at a time, on one event loop."""

    async def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        return await getattr(self.object, method)(*arguments, **named)


class HostedProcess(Generic[T]):
    """The driver's handle of an object of type T that lives in a Ray process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, method: Callable[Concatenate[T, P], R], *arguments: P.args, **named: P.kwargs) -> ObjectRef[R]:
        """Calls a method of the object there, such as `submit(RolloutEngine.update_weights, update)`. Returns at once;
        `results` waits for the answer. The object itself may be of another class that has this method."""
        ref: ObjectRef[R] = self._actor.call.remote(method.__name__, *arguments, **named)
        return ref

    def submit_beside(
        self, method: Callable[Concatenate[T, P], R], *arguments: P.args, **named: P.kwargs
    ) -> ObjectRef[R]:
        """As `submit`, in a thread of its own, while other calls still run one after another."""
        ref: ObjectRef[R] = self._actor.call_beside.remote(method.__name__, *arguments, **named)
        return ref

    def node_address(self) -> ObjectRef[str]:
        """Address at which processes on other nodes of this run reach this one."""
        ref: ObjectRef[str] = self._actor.node_address.remote()
        return ref

    def devices(self) -> ObjectRef[str]:
        """CUDA_VISIBLE_DEVICES as Ray has set it in the process."""
        ref: ObjectRef[str] = self._actor.devices.remote()
        return ref

    def kill(self) -> None:
        ray.kill(self._actor)


def shared(value: T, users: int) -> T:
    """Returns a value as an argument of `submit` for so many processes: several share one copy in Ray's object store,
    whose reference Ray replaces by the value. Otherwise Ray pickles the value anew for each of them."""
    return cast(T, ray.put(value)) if users > 1 else value


def _interface(address: str) -> str:
    """Name of the network interface with this address."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    raise RuntimeError(f"no network interface of this node has the address {address}, by which Ray knows the node")


def host_process(
    make: Callable[[], T],
    *,
    log_file: Path,
    nodes: Nodes,
    node: int,
    gpus: int,
    cpus: int = 1,
    devices: str | None = None,
    hosted: type[Hosted] = Hosted,
    variables: Mapping[str, str] | None = None,
) -> HostedProcess[T]:
    """Starts a process that holds one object; one thread each on CPU, since several processes share a machine.

    make: makes the object in that process; it is pickled, so it imports heavy modules itself. devices: GPUs of another
    process to share; Ray then reserves none. variables: further environment variables.
    """
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    environment |= variables or {}
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
    return HostedProcess(actor.remote(make, log_file.resolve(), nodes.many, Path.cwd()))


def progress_deadline() -> ProgressDeadline | None:
    """Deadline for a wait that does not go through `results`; None outside `ray_runtime`."""
    return ProgressDeadline(_watch) if _watch else None


def as_done(refs: Collection[ObjectRef[R]]) -> Iterator[ObjectRef[R]]:
    """Yields each reference as soon as its call has ended, in success or failure; `results` gives the outcome.

    Raises UserError as `results` does when no process makes progress any more."""
    return finished(list(refs), progress_deadline())


def results(refs: Sequence[ObjectRef[R]]) -> list[R]:
    """`ray.get`, but a process's UserError or OSError is raised as the original error: Ray's copy lacks the errno.

    Within `ray_runtime` the wait is bounded: UserError is raised when no process makes progress any more.
    """
    try:
        found: list[R] = _watch.results(list(refs)) if _watch else ray.get(list(refs))
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | OSError):
            raise error.cause from error
        raise
