"""Faults of a run in progress: signals to its processes, full and read-only folders, exhausted limits, other clocks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_rl.rollout.servers import guard

TARGETS = ("actor", "engine", "server", "server", "router", "guard", "reward", "driver", "raylet", "gcs", "agent")
"""Kinds of processes; one named twice is chosen more often. `engine` is the embedded engine or a server's client;
`server` is any process of the server itself; `guard` watches a server or the router."""
COMPUTING = ("driver", "actor", "engine", "server", "reward")


@dataclass(frozen=True)
class Scene:
    """A run in progress, as faults see it."""

    driver: int
    folder: Path
    """The run's folder, on a small file system of its own if `small_disk`."""
    shm: Path | None
    """What the run sees as /dev/shm."""
    small_disk: bool
    clock: Path | None
    """The file by which the run's clock is moved, if it can be."""
    second: Callable[[], str] | None = None
    """Starts a second run in the same folder and says how it ended."""
    network: str = ""
    """The network namespace that only the run is in, if it has one."""


def processes(scene: Scene) -> dict[str, list[psutil.Process]]:
    """Returns the processes of the run by kind."""
    found: dict[str, list[psutil.Process]] = {}
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(scene.driver)
        found["driver"] = [root]
        hosted = _hosted(scene.folder)
        for process in root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                kind = hosted.get(process.pid) or _kind(process)
                if kind and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(kind, []).append(process)
    return found


def _hosted(folder: Path) -> dict[int, str]:
    kinds = {}
    for path in (folder / "logs/heartbeats").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):
            kinds[json.loads(path.read_text())["pid"]] = path.stem.split("-")[0]
    return kinds


def _kind(process: psutil.Process) -> str | None:
    command = " ".join(process.cmdline())
    for parent in (process, *process.parents()):
        if guard.__file__ in (line := parent.cmdline()):
            return "guard" if parent == process else "router" if "sglang_router" in " ".join(line) else "server"
    marks = {"/raylet/raylet": "raylet", "gcs_server": "gcs", "spawn_main": "reward"}
    marks |= {"dashboard/agent": "agent", "runtime_env": "agent", "DashboardAgent": "agent", "RuntimeEnvAgent": "agent"}
    return next((kind for mark, kind in marks.items() if mark in command), None)


Fault = Callable[[Scene, random.Random], str | None]
"""Injects one fault, and lifts it if it can be lifted. Returns its target; None if there was none."""


def _pick(scene: Scene, rng: random.Random, kinds: tuple[str, ...] = TARGETS) -> tuple[str, psutil.Process] | None:
    there = processes(scene)
    kinds = tuple(kind for kind in kinds if there.get(kind))
    if not kinds:
        return None
    kind = rng.choice(kinds)
    return kind, rng.choice(sorted(there[kind], key=lambda process: process.pid))


def signalled(number: signal.Signals, kinds: tuple[str, ...] = TARGETS) -> Fault:
    """Returns the fault that sends a signal to a process of one of these kinds."""

    def inject(scene: Scene, rng: random.Random) -> str | None:
        picked = _pick(scene, rng, kinds)
        if picked is None:
            return None
        kind, process = picked
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
        return kind

    return inject


def stop_and_continue(scene: Scene, rng: random.Random) -> str | None:
    picked = _pick(scene, rng)
    if picked is None:
        return None
    kind, process = picked
    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()
        try:
            time.sleep(rng.uniform(0.1, 3.0))
        finally:
            process.resume()
    return kind


def kill_several(scene: Scene, rng: random.Random) -> str | None:
    """Kills two processes at the same time."""
    picked = {found for _ in range(2) if (found := _pick(scene, rng))}
    for _, process in picked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return "+".join(sorted(kind for kind, _ in picked)) or None


def few_descriptors(scene: Scene, rng: random.Random) -> str | None:
    """For a moment, a process can open no more than a few files."""
    picked = _pick(scene, rng, COMPUTING)
    if picked is None:
        return None
    return _limited(*picked, resource.RLIMIT_NOFILE, picked[1].num_fds() + rng.randrange(4), rng)


def little_memory(scene: Scene, rng: random.Random) -> str | None:
    """For a moment, a process can allocate no more than a few megabytes."""
    picked = _pick(scene, rng, COMPUTING)
    if picked is None:
        return None
    more = rng.choice((0, 1, 16)) * 2**20
    return _limited(*picked, resource.RLIMIT_AS, picked[1].memory_info().vms + more, rng)


def _limited(kind: str, process: psutil.Process, limit: int, most: int, rng: random.Random) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        before = resource.prlimit(process.pid, limit)
        resource.prlimit(process.pid, limit, (most, before[1]))
        try:
            time.sleep(rng.uniform(0.2, 2.0))
        finally:
            resource.prlimit(process.pid, limit, before)
    return kind


def full_disk(scene: Scene, rng: random.Random) -> str | None:
    if not scene.small_disk:
        return None
    with _filled(scene.folder.parent / "filler", keep=rng.choice((0, 0, 1, 20)) * 2**10):
        time.sleep(rng.uniform(0.5, 4.0))
    return "run folder"


def full_shm(scene: Scene, rng: random.Random) -> str | None:
    if scene.shm is None:
        return None
    with _filled(scene.shm / "filler", keep=rng.choice((0, 4)) * 2**10):
        time.sleep(rng.uniform(0.5, 4.0))
    return "/dev/shm"


@contextlib.contextmanager
def _filled(path: Path, keep: int) -> Iterator[None]:
    """Takes all space of the path's file system except `keep` bytes."""
    try:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while file.write(bytes(2**16)) == 2**16:
                pass
        with path.open("r+b") as file:
            file.truncate(max(0, path.stat().st_size - keep))
        yield
    finally:
        path.unlink(missing_ok=True)


def read_only(scene: Scene, rng: random.Random) -> str | None:
    """For a moment, nobody, not even root, may create or remove a file in a folder of the run."""
    folders = [scene.folder, scene.folder / "checkpoints", scene.folder / "rollouts", scene.folder / "logs"]
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        return None
    folder = rng.choice(there)
    if not _for_a_moment(["chattr", "+i", folder], ["chattr", "-i", folder], rng.uniform(0.5, 4.0)):
        return None
    return "run folder" if folder == scene.folder else folder.name


def stalled_disk(scene: Scene, rng: random.Random) -> str | None:
    """For a moment, whoever writes to the run's folder waits, as for a network disk that does not answer."""
    if not scene.small_disk:
        return None
    place = scene.folder.parent
    freeze, thaw = (["fsfreeze", option, place] for option in ("--freeze", "--unfreeze"))
    return "run folder" if _for_a_moment(freeze, thaw, rng.uniform(0.3, 3.0)) else None


def _for_a_moment(begin: Sequence[str | Path], end: Sequence[str | Path], seconds: float) -> bool:
    """Runs a command, and after so many seconds the one that undoes it. Returns whether the first one succeeded."""
    if subprocess.run(begin, capture_output=True).returncode:
        return False
    try:
        time.sleep(seconds)
    finally:
        subprocess.run(end, check=True)
    return True


def connection_reset(scene: Scene, rng: random.Random) -> str | None:
    """Resets a TCP connection between processes of the run."""
    if not scene.network:
        return None
    shown = subprocess.run([*_within(scene), "ss", "-Htn", "state", "established"], capture_output=True, text=True)
    found = sorted(line.split()[2:4] for line in shown.stdout.splitlines())
    if not found:
        return None
    ends = [address.rpartition(":")[2] for address in rng.choice(found)]
    owners = {port: _listener(scene, port) for port in ends}
    reset = ["ss", "-K", "-tn", "sport", "=", f":{ends[0]}", "and", "dport", "=", f":{ends[1]}"]
    subprocess.run([*_within(scene), *reset], check=True, capture_output=True)
    return next((f"connection to {owner}" for owner in owners.values() if owner), "connection")


def _listener(scene: Scene, port: str) -> str | None:
    """Returns the kind of the process that listens on a port."""
    shown = subprocess.run([*_within(scene), "ss", "-Htlnp", f"sport = :{port}"], capture_output=True, text=True)
    owners = {int(pid) for pid in re.findall(r"pid=(\d+)", shown.stdout)}
    return next((kind for kind, there in processes(scene).items() for one in there if one.pid in owners), None)


def network_cut(scene: Scene, rng: random.Random) -> str | None:
    """For a moment, no packet passes between processes of the run; later, the kernel sends them again."""
    if not scene.network:
        return None
    drop, pass_on = (
        [*_within(scene), "iptables", option, "INPUT", "-i", "lo", "-j", "DROP"] for option in ("-A", "-D")
    )
    if not _for_a_moment(drop, pass_on, rng.choice((0.2, 1.0, 4.0))):
        raise RuntimeError(f"the network of {scene.network} cannot be cut: {' '.join(drop)}")
    return "loopback"


def _within(scene: Scene) -> tuple[str, ...]:
    return ("ip", "netns", "exec", scene.network)


def other_clock(scene: Scene, rng: random.Random) -> str | None:
    """Moves the clock of the run's processes by up to a day, either way."""
    if scene.clock is None:
        return None
    seconds = rng.choice((-86400, -3600, -5, 5, 3600, 86400))
    fresh = scene.clock.with_name("clock.fresh")
    fresh.write_text(f"{seconds:+d}\n")
    os.replace(fresh, scene.clock)
    time.sleep(rng.uniform(0.5, 2.0))
    return f"{seconds:+d} s"


def second_run(scene: Scene, rng: random.Random) -> str | None:
    """Starts another run in the folder. The first stands still meanwhile, so that it cannot come to its end before."""
    lock = scene.folder / ".lock"
    if not scene.second or not lock.is_file() or f"process {scene.driver} " not in lock.read_text(errors="replace"):
        return None
    try:
        first = psutil.Process(scene.driver)
        first.suspend()
    except psutil.NoSuchProcess:
        return None
    try:
        return scene.second()
    finally:
        first.resume()


FAULTS: dict[str, Fault] = {
    "SIGKILL": signalled(signal.SIGKILL),
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGSTOP, SIGCONT": stop_and_continue,
    "two killed": kill_several,
    "few descriptors": few_descriptors,
    "little memory": little_memory,
    "full disk": full_disk,
    "full /dev/shm": full_shm,
    "read-only folder": read_only,
    "stalled disk": stalled_disk,
    "connection reset": connection_reset,
    "network cut": network_cut,
    "clock jump": other_clock,
    "second run": second_run,
}
WEIGHTS = {"SIGKILL": 3, "SIGSTOP, SIGCONT": 6, "two killed": 1, "connection reset": 6, "network cut": 4}
WEIGHTS |= {"stalled disk": 4, "second run": 1, "clock jump": 4}
"""How often a kind is chosen; the others count 2."""


def choose(rng: random.Random, only: tuple[str, ...] = ()) -> str:
    names = [name for name in FAULTS if not only or name in only]
    return rng.choices(names, [WEIGHTS.get(name, 2) for name in names])[0]
