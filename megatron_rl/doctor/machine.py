"""This machine: limits, memory that processes share, disks, ports, GPUs. Nothing here loads torch."""

from __future__ import annotations

import csv
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from megatron_rl.doctor.finding import Finding, judged

GIB = 2**30
OPEN_FILES = 65536
SHARED_MEMORY_GIB = {"cpu": 1, "cuda": 16}
"""NCCL and Ray's object store live there; Docker gives 64 MiB unless asked."""


def check_limits(device: str) -> Iterator[Finding]:
    """Of this process, and so of those it will start."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    yield judged(
        "open files",
        many,
        _limit(files),
        f"raise the hard limit to {OPEN_FILES} (ulimit -Hn; LimitNOFILE of slurmd or Docker)",
        otherwise="warning",
    )
    if device != "cpu":
        _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        yield judged(
            "locked memory",
            locked == resource.RLIM_INFINITY,
            _limit(locked),
            "InfiniBand needs it unlimited (ulimit -l; LimitMEMLOCK of slurmd, --ulimit memlock=-1 of Docker)",
            otherwise="warning",
        )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_shared_memory(device: str, path: Path = Path("/dev/shm")) -> Finding:
    least = SHARED_MEMORY_GIB["cpu" if device == "cpu" else "cuda"]
    if not path.is_dir():
        return Finding("shared memory", "warning", f"there is no {path}", "weights go through temporary files instead")
    size = psutil.disk_usage(str(path)).total / GIB
    remedy = f"give it {least} GiB: --shm-size or --ipc=host of Docker"
    return judged("shared memory", size >= least, f"{path}: {size:.1f} GiB", remedy)


def check_disk(folder: Path, needed_bytes: float, what: str) -> Finding:
    """Room for `what` in a folder that may not be there yet."""
    parent = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
    free = psutil.disk_usage(str(parent)).free
    found = f"{parent}: {free / GIB:.1f} GiB free, {needed_bytes / GIB:.1f} needed for {what}"
    remedy = "free some, choose another run.folder, or lower train.keep_checkpoints"
    return judged("disk", free > needed_bytes, found, remedy)


def check_ports(ports: Iterable[int]) -> Finding:
    """Whether nobody listens on them here."""
    taken = [port for port in ports if not _is_free(port)]
    return judged(
        "ports",
        not taken,
        f"taken: {', '.join(map(str, taken[:5]))}" if taken else "those of Ray are free",
        "another Ray may run here (ray status); end it, or set cluster.slurm.port",
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
"""More than an idle GPU has in use."""


def check_gpus(device: str) -> Iterator[Finding]:
    """What nvidia-smi says of them; a GPU in use by others, or with memory errors, is a finding of its own."""
    if device == "cpu":
        yield Finding("GPUs", "skipped", "not looked for: actor.device is cpu, or there is no driver")
        return
    if shutil.which("nvidia-smi") is None:
        remedy = "is the driver installed, the container started with GPUs?"
        yield Finding("GPUs", "failure", "no nvidia-smi here", remedy)
        return
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        yield Finding("GPUs", "failure", said, "the driver does not answer: have the node looked at")
        return
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    kinds = sorted({f"{name} ({float(total) / 1024:.0f} GiB), driver {driver}" for _, name, driver, total, *_ in rows})
    found = f"{len(rows)} x {'; '.join(kinds)}"
    yield judged("GPUs", len(kinds) == 1, found, "a run needs GPUs of one kind", otherwise="warning")
    for number, _, _, _, used, errors in rows:
        if errors.isdigit() and int(errors):
            found = f"{errors} uncorrected memory errors"
            yield Finding(f"GPU {number}", "failure", found, "have the node taken out and the GPU reset")
        if float(used) > USED_MIB:
            found = f"{float(used) / 1024:.1f} GiB in use already"
            yield Finding(f"GPU {number}", "warning", found, "another process has it: see nvidia-smi")
