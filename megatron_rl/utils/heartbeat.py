"""Heartbeats: one small file per process that records what the process is doing, to explain a run that hangs.

A process calls `start` once and `notify` with each new activity. Other processes can read the file at any time, even
while its process is stuck.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import parse_json, read_bytes
from megatron_rl.utils.files import write_error
from megatron_rl.utils.format import duration

FOLDER = "heartbeats"
"""Folder of the heartbeat files within a run's `logs`."""
IDLE = "idle"
_BYTES = 1024
"""Size of a heartbeat file. Every beat overwrites the whole file, so a reader sees either the old or the new beat."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The last recorded activity of a process."""

    process: str
    """Name of the process, the same as that of its log file: `actor-rank-3`."""
    pid: int
    node: str
    """Ray's id of the node."""
    call: str
    """The driver's last call to the process: `train`, `generate`, ... or `idle`."""
    doing: str
    """Progress within the call: `micro-batch 3 of 8, forward`."""
    count: int
    """Number of beats since the process started; the number rises as long as the process makes progress."""
    since: float
    """Time of this beat in Unix seconds, by the clock of the process."""
    memory_gib: float
    """Peak memory of the process so far: GPU memory if the process uses a GPU, resident memory otherwise."""


class Heartbeat:
    """The writing side. Raises UserError if the file cannot be created."""

    def __init__(self, folder: Path, process: str, node: str) -> None:
        path = folder / f"{process}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(path, error) from error
        self._beat = Beat(process, os.getpid(), node, IDLE, "", 0, time.time(), peak_memory_gib())
        self.write(IDLE, "")

    def write(self, call: str | None, doing: str) -> None:
        """Writes a beat. `call` None keeps the previous call."""
        old = self._beat
        self._beat = replace(
            old,
            call=call or old.call,
            doing=doing,
            count=old.count + 1,
            since=time.time(),
            memory_gib=peak_memory_gib(),
        )
        with suppress(OSError):  # on a full disk the work must go on, and only its explanation is missing
            os.pwrite(self._file, json.dumps(asdict(self._beat)).ljust(_BYTES).encode()[:_BYTES], 0)


def peak_memory_gib() -> float:
    """Returns the peak memory of this process: GPU memory if it uses a GPU, resident memory otherwise."""
    torch = sys.modules.get("torch")  # a process that has not loaded torch uses no GPU
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_reserved()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_metrics(beats: Sequence[Beat]) -> dict[str, float]:
    """Returns `memory/actor_gib`, `memory/engine_gib`, ...: the highest peak among the processes of each kind."""
    metrics: dict[str, float] = {"memory/driver_gib": peak_memory_gib()}
    for beat in beats:
        name = f"memory/{beat.process.split('-')[0]}_gib"
        metrics[name] = max(metrics.get(name, 0.0), beat.memory_gib)
    return metrics


_own: Heartbeat | None = None


def start(folder: Path, process: str, node: str) -> None:
    """Starts the heartbeat of this process in `folder/<process>.json`."""
    global _own
    _own = Heartbeat(folder, process, node)


def notify(doing: str, *, call: str | None = None) -> None:
    """Records the next activity. Does nothing in a process that has not started a heartbeat, such as a test."""
    if _own is not None:
        _own.write(call, doing)


def read_beats(folder: Path) -> list[Beat]:
    """Returns the last beat of every process, sorted by name. A file that holds no beat, for example because the disk
    was full, is left out."""
    return [beat for path in sorted(folder.glob("*.json")) if (beat := _read_beat(path))]


def _read_beat(path: Path) -> Beat | None:
    try:
        return Beat(**parse_json(read_bytes(path, _BYTES), str(path)))
    except (UserError, TypeError):
        return None


def table(beats: Sequence[Beat], now: float) -> str:
    """Formats one line per process: its activity and for how long it has lasted."""
    width = max((len(beat.process) for beat in beats), default=0)
    return "\n".join(
        f"  {beat.process:<{width}}  {beat.call}{f': {beat.doing}' if beat.doing else ''}, "
        f"for {duration(now - beat.since)} (pid {beat.pid}, at most {beat.memory_gib:.1f} GiB)"
        for beat in beats
    )
