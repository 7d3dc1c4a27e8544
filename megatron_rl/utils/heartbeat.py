"""What every process of a run is doing right now, in a small file each, so that a run that hangs can be explained.

A process calls `start` once and `notify` as it goes; everyone else may read, also while the process is stuck.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_rl.utils.files import write_error
from megatron_rl.utils.format import duration

FOLDER = "heartbeats"
"""Within a run's `logs`."""
IDLE = "idle"
_BYTES = 1024
"""Every beat takes the whole file, so a reader sees the old one or the new one."""


@dataclass(frozen=True, slots=True)
class Beat:
    process: str
    """As its log file is called: `actor-rank-3`."""
    pid: int
    node: str
    """Ray's id of the node."""
    call: str
    """What the driver asked for last: `train`, `generate`, ... or `idle`."""
    doing: str
    """How far it is with that: `micro-batch 3 of 8, forward`."""
    count: int
    """Beats since the process began; it rises as long as there is progress."""
    since: float
    """Unix seconds, by the process's own clock."""
    memory_gib: float
    """Most it has held so far: of its GPU where it uses one, else of the machine."""


class Heartbeat:
    """The writing side. Raises UserError when the file cannot be made."""

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
        """call: None for the same as before."""
        old = self._beat
        self._beat = replace(
            old,
            call=call or old.call,
            doing=doing,
            count=old.count + 1,
            since=time.time(),
            memory_gib=peak_memory_gib(),
        )
        os.pwrite(self._file, json.dumps(asdict(self._beat)).ljust(_BYTES).encode()[:_BYTES], 0)


def peak_memory_gib() -> float:
    """The most memory this process has held: its GPU's where it uses one, else resident memory."""
    torch = sys.modules.get("torch")  # a process that has not loaded it uses no GPU
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_reserved()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_metrics(beats: Sequence[Beat]) -> dict[str, float]:
    """`memory/actor_gib`, `memory/engine_gib`, ...: of the process of each kind that has held most."""
    metrics: dict[str, float] = {"memory/driver_gib": peak_memory_gib()}
    for beat in beats:
        name = f"memory/{beat.process.split('-')[0]}_gib"
        metrics[name] = max(metrics.get(name, 0.0), beat.memory_gib)
    return metrics


_own: Heartbeat | None = None


def start(folder: Path, process: str, node: str) -> None:
    """From now on this process says what it does in `folder/<process>.json`."""
    global _own
    _own = Heartbeat(folder, process, node)


def notify(doing: str, *, call: str | None = None) -> None:
    """What comes next; nothing happens in a process that has not started a heartbeat, such as a test."""
    if _own is not None:
        _own.write(call, doing)


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every process, by name."""
    return [Beat(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json")) if path.stat().st_size]


def table(beats: Sequence[Beat], now: float) -> str:
    """A line a process: what it does and for how long."""
    width = max((len(beat.process) for beat in beats), default=0)
    return "\n".join(
        f"  {beat.process:<{width}}  {beat.call}{f': {beat.doing}' if beat.doing else ''}, "
        f"for {duration(now - beat.since)} (pid {beat.pid}, at most {beat.memory_gib:.1f} GiB)"
        for beat in beats
    )
