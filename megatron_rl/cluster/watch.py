"""Bounded waits for the processes of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_rl.cluster.hang import Evidence, examine, explain
from megatron_rl.errors import UserError
from megatron_rl.utils import heartbeat
from megatron_rl.utils.heartbeat import Beat

POLL_SECONDS = 5.0


@dataclass
class Watch:
    """Looks at the processes' heartbeats while the driver waits."""

    logs: Path
    limit_seconds: float
    """Longest time without progress of any process; 0: no limit."""

    @property
    def heartbeats(self) -> Path:
        return self.logs / heartbeat.FOLDER

    def results(self, refs: list[ObjectRef[Any]]) -> list[Any]:
        """`ray.get`, but raises the first error of a process at once, and UserError if no process makes progress."""
        done = {ref: ray.get(ref) for ref in finished(refs, ProgressDeadline(self))}
        return [done[ref] for ref in refs]

    def stop(self, quiet_seconds: float) -> None:
        """Saves the stacks of all processes and raises UserError with an explanation."""
        beats = heartbeat.read_beats(self.heartbeats)
        seen = {beat.process: _examine(beat) for beat in beats}
        folder = self.logs / "stacks"
        folder.mkdir(exist_ok=True)
        for process, evidence in seen.items():
            (folder / f"{process}.txt").write_text(f"state: {evidence.state}\n{evidence.stack}\n", encoding="utf-8")
        raise UserError(
            f"{explain(beats, seen, quiet_seconds)}\nStacks: {folder}. Go on from the last checkpoint with resume=auto."
        )


class ProgressDeadline:
    """Time limit of one wait, extended by every sign of progress."""

    def __init__(self, watch: Watch) -> None:
        self._watch, self._since = watch, time.monotonic()
        self._counts: dict[str, int] = {}

    @property
    def poll_seconds(self) -> float | None:
        """Interval at which to call `check`; None: never."""
        limit = self._watch.limit_seconds
        return min(POLL_SECONDS, limit / 3) if limit else None

    def check(self, *, progress: bool) -> None:
        """Raises UserError if nothing has come and no process has made progress for the watch's limit.

        progress: whether something has come since the last call.
        """
        if progress or not self._watch.limit_seconds:
            self._since = time.monotonic()
            return
        now = {beat.process: beat.count for beat in heartbeat.read_beats(self._watch.heartbeats)}
        if now != self._counts:
            self._counts, self._since = now, time.monotonic()
        elif time.monotonic() - self._since > self._watch.limit_seconds:
            self._watch.stop(time.monotonic() - self._since)


def finished(refs: list[ObjectRef[Any]], progress_deadline: ProgressDeadline | None) -> Iterator[ObjectRef[Any]]:
    """Yields each reference as soon as its call has ended, in success or failure."""
    while refs:
        ready, refs = ray.wait(refs, timeout=progress_deadline.poll_seconds if progress_deadline else None)
        if progress_deadline:
            progress_deadline.check(progress=bool(ready))
        yield from ready


def _examine(beat: Beat) -> Evidence:
    """Examines the process on its own node."""
    if beat.node == ray.get_runtime_context().get_node_id():
        return examine(beat.pid)
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    task = ray.remote(examine).options(num_cpus=0, scheduling_strategy=there).remote(beat.pid)
    try:
        found: Evidence = ray.get(task, timeout=60)
    except ray.exceptions.RayError as error:
        found = Evidence("gone", f"its node does not answer: {type(error).__name__}")
    return found
