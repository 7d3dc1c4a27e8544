"""Checks of this machine: limits, shared memory, disk, ports and GPUs. This module does not load torch."""

from __future__ import annotations

import csv
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from megatron_rl.config import Config
from megatron_rl.doctor.findings import Finding, judged
from megatron_rl.errors import UserError
from megatron_rl.utils.versions import DRIVERS

GIB = 2**30
OPEN_FILES = 65536
SHARED_MEMORY_GIB = {"cpu": 1, "cuda": 16}
LEAST_FREE = 2**30
"""Bytes on disk without which not even a small run's logs and Ray's files have room."""
"""Shared memory that NCCL and Ray's object store need. Docker gives 64 MiB by default."""


def check_limits(device: str) -> Iterator[Finding]:
    """Check the limits of this process, which the processes that it starts inherit."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    yield judged(
        "open files",
        many,
        _limit(files),
        f"raise the hard limit to {OPEN_FILES} (shown by ulimit -Hn; set by LimitNOFILE of slurmd or Docker)",
        otherwise="warning",
    )
    if device != "cpu":
        _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        yield judged(
            "locked memory",
            locked == resource.RLIM_INFINITY,
            _limit(locked),
            "make it unlimited for InfiniBand (shown by ulimit -l; set by LimitMEMLOCK of slurmd or Docker's "
            "--ulimit memlock=-1)",
            otherwise="warning",
        )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_shared_memory(device: str, weights: float = 0.0, path: Path = Path("/dev/shm")) -> Finding:
    """weights: bytes of weights that engines read there, besides what other programs need."""
    least = SHARED_MEMORY_GIB["cpu" if device == "cpu" else "cuda"] + weights / GIB
    if not path.is_dir():
        return Finding(
            "shared memory", "warning", f"{path} does not exist", "weights go through temporary files instead"
        )
    size = psutil.disk_usage(str(path)).total / GIB
    weights_too = f", {weights / GIB:.1f} of them for weights (weight_sync.transport: shared_memory)" if weights else ""
    remedy = f"provide at least {least:.1f} GiB{weights_too}, in Docker with --shm-size or --ipc=host"
    return judged("shared memory", size >= least, f"{path}: {size:.1f} GiB", remedy)


def shared_weights(config: Config) -> float:
    """Returns the bytes of weights that engines of a run read in /dev/shm; 0 if the run has no plan, which other checks
    report."""
    from megatron_rl.plan.memory import shared_memory_bytes
    from megatron_rl.plan.setup import setup_of

    try:
        return shared_memory_bytes(setup_of(config))
    except UserError:
        return 0.0


def check_disk(folder: Path, needed_bytes: float, spare_bytes: float, what: str) -> Finding:
    """Check the free space for `what` in a folder that may not exist yet: a failure if what is surely needed does not
    fit, or not even `LEAST_FREE` is left beside it, and a warning if what may be needed besides does not."""
    parent = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = psutil.disk_usage(str(parent)).free
    wanted = needed_bytes + spare_bytes
    found = f"{parent}: {free / GIB:.1f} GiB free, up to {wanted / GIB:.1f} GiB needed for {what}"
    remedy = "free some space, choose another run.folder, or lower train.keep_checkpoints"
    fits = free > needed_bytes + LEAST_FREE
    return judged("disk", free > wanted, found, remedy, otherwise="warning" if fits else "failure")


def check_ports(ports: Iterable[int]) -> Finding:
    """Check that no process on this machine listens on the ports."""
    taken = [port for port in ports if not _is_free(port)]
    return judged(
        "ports",
        not taken,
        f"already in use: {', '.join(map(str, taken[:5]))}" if taken else "Ray's ports are free",
        "another Ray may be running here (see ray status): stop it, or set cluster.slurm.port",
        otherwise="warning",
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


QUERY = ("index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
USED_MIB = 1024
"""An idle GPU uses less memory than this."""
ENGINES_CUDA = max(DRIVERS)
"""Major version of CUDA that the supported releases of SGLang and vLLM are built for."""
OLD_DRIVER = (
    "install a newer driver: SGLang, vLLM and the image are built for this CUDA. An older driver of a data-centre GPU "
    "works only with NVIDIA's forward compatibility libraries (cuda-compat), which the image has"
)


def check_gpus(device: str) -> Iterator[Finding]:
    """Check the GPUs with nvidia-smi. A GPU that is in use or has memory errors gets a finding of its own."""
    if device == "cpu":
        yield Finding("GPUs", "skipped", "not checked: actor.device is cpu, or no driver is installed")
        return
    if shutil.which("nvidia-smi") is None:
        remedy = "install the driver, or start the container with access to the GPUs"
        yield Finding("GPUs", "failure", "nvidia-smi was not found", remedy)
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        output = (done.stderr or done.stdout).strip()
        yield Finding("GPUs", "failure", output, "the driver does not respond: have the node repaired")
        return
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    kinds = sorted({f"{name} ({float(total) / 1024:.0f} GiB), driver {driver}" for _, name, driver, total, *_ in rows})
    found = f"{len(rows)} x {'; '.join(kinds)}"
    yield judged("GPUs", len(kinds) == 1, found, "use GPUs of one kind for a run", otherwise="warning")
    if old := sorted({driver for _, _, driver, *_ in rows if int(driver.split(".")[0]) < DRIVERS[ENGINES_CUDA]}):
        found = f"{', '.join(old)}; CUDA {ENGINES_CUDA} needs {DRIVERS[ENGINES_CUDA]} or newer"
        yield Finding("driver", "warning", found, OLD_DRIVER)
    for number, _, _, _, used, errors in rows:
        if errors.isdigit() and int(errors):
            found = f"{errors} uncorrected memory errors"
            yield Finding(f"GPU {number}", "failure", found, "take the node out of service and have the GPU reset")
        if float(used) > USED_MIB:
            found = f"{float(used) / 1024:.1f} GiB already in use"
            yield Finding(f"GPU {number}", "warning", found, "another process uses this GPU: see nvidia-smi")
