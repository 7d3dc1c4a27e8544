"""Writes checkpoints: complete or not at all, and in the background of training if `train.async_save` is set.

The ranks write into `step_000050.<random>.partial`; the driver then adds the manifest and renames the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from megatron_rl.checkpoint import rng
from megatron_rl.checkpoint.manifest import (
    FORMAT,
    PARTIAL,
    RNG,
    DriverState,
    Manifest,
    Origin,
    RandomState,
    RandomStates,
    RankPart,
    checkpoints,
    step_of,
    write_manifest,
    write_rng,
)
from megatron_rl.checkpoint.retention import Retention, link, prune
from megatron_rl.checkpoint.rollout_buffer import BUFFER_FILE, write_buffer
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group


class Ranks(Protocol):
    """All ranks of the actor, as the saver uses them."""

    def state_bytes(self) -> int:
        """Returns the size of a checkpoint in bytes."""

    def write_state(self, folder: Path) -> list[RankPart]:
        """Writes the state now, one file at a time."""

    def hold_state(self) -> None:
        """Copies the state to CPU memory."""

    def write_held(self, folder: Path) -> list[RankPart]:
        """Writes the state that `hold_state` copied; the ranks may train meanwhile."""


class Saver:
    """Saves a run's checkpoints, one at a time. Leaving the `with` block waits for the last one, unless interrupted."""

    def __init__(
        self, folder: Path, ranks: Ranks, origin: Origin, retention: Retention, announce: Callable[[str], None]
    ) -> None:
        self._folder, self._ranks, self._origin = folder, ranks, origin
        self._retention, self._announce = retention, announce
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[float] | None = None
        self._seconds: float | None = None
        self.newest: Path | None = None
        """The checkpoint that this process has written last."""
        for left in folder.glob(f"step_*{PARTIAL}"):  # left behind by a killed run
            shutil.rmtree(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=not isinstance(error, KeyboardInterrupt))
        if error is None:
            self.wait()
        elif self._pending is not None and self._pending.done() and (second := self._pending.exception()):
            self._announce(f"error: {second}")  # `error` itself ends the run and is reported elsewhere

    def save(
        self, state: DriverState, metrics: dict[str, float], groups: Sequence[Group] = (), *, background: bool
    ) -> None:
        """Saves a checkpoint of the step that ended with `metrics`. Waits for the previous save first.

        groups: the groups in the rollout buffer. background: return as soon as the state is copied to CPU memory;
        `poll` and `wait` report the outcome. Raises UserError if the disk is full; then nothing half-written is left
        and older checkpoints are untouched.
        """
        self.wait()
        needed = self._ranks.state_bytes()
        target = self._folder / f"step_{state.step:06d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise UserError(_full_disk(target, f"{_mib(needed)} needed, {_mib(free)} free"))
        self._announce_missing_metric(metrics)
        manifest = Manifest(FORMAT, state, dict(metrics), self._origin, optimizer_steps=0, files={})
        publish = partial(self._publish, target, manifest, rng.capture(), tuple(groups), needed)
        if background:
            self._ranks.hold_state()
            self._pending = self._thread.submit(publish, self._ranks.write_held)
        else:
            publish(self._ranks.write_state)

    def _announce_missing_metric(self, metrics: Mapping[str, float]) -> None:
        measured = sorted(name for name in metrics if name.startswith("eval/"))
        if self._retention.best and measured and self._retention.best.metric not in measured:
            self._announce(
                f"train.keep_best: the metric {self._retention.best.metric} was not measured, so this checkpoint "
                f"is not among the best; measured were {', '.join(measured)}"
            )

    def poll(self) -> dict[str, float]:
        """Returns metrics of a background save that ended since the last call. Raises UserError if the save failed."""
        if self._pending is not None and self._pending.done():
            self.wait()
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {"perf/checkpoint_background_seconds": seconds}

    def wait(self) -> None:
        """Waits for the save under way. Raises UserError if the save failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._seconds = pending.result()

    def _publish(
        self,
        target: Path,
        manifest: Manifest,
        driver: RandomState,
        groups: Sequence[Group],
        needed: int,
        write_ranks: Callable[[Path], list[RankPart]],
    ) -> float:
        """Writes, renames and prunes. Returns the seconds that took."""
        start = time.perf_counter()
        fresh, replaced = _unique(target), _unique(target)
        try:
            fresh.mkdir()
            _complete(fresh, manifest, driver, groups, write_ranks(fresh))
            _sync(fresh)
            if target.exists():  # the run reached this step again after resuming from an older checkpoint
                target.rename(replaced)
            fresh.rename(target)
            self.newest = target
            _sync(self._folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(_full_disk(target, f"{_mib(needed)} needed; {error.strerror}")) from error
            raise UserError(f"cannot write the checkpoint {target}: {error.strerror or error}") from error
        finally:
            for left in (fresh, replaced):
                shutil.rmtree(left, ignore_errors=True)
        # Later checkpoints belong to the part of the run that was abandoned when it resumed from an older one.
        for path in checkpoints(self._folder):
            if step_of(path) > step_of(target):
                shutil.rmtree(path)
        link(self._folder, self._retention, self._announce)
        prune(self._folder, self._retention)
        self._announce(f"checkpoint: {target}")
        return time.perf_counter() - start


def _complete(
    folder: Path, manifest: Manifest, driver: RandomState, groups: Sequence[Group], parts: list[RankPart]
) -> None:
    """Adds the driver's files and the manifest to the files of the ranks."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    files[RNG] = write_rng(folder, RandomStates(driver, [part.rng for part in parts]))
    if groups:
        files[BUFFER_FILE] = write_buffer(folder, groups)
    write_manifest(folder, replace(manifest, optimizer_steps=parts[0].optimizer_steps, files=files))


def _unique(target: Path) -> Path:
    """Returns a name that no other process writes to, not even a process that a killed run left behind."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")


def _sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _full_disk(target: Path, what: str) -> str:
    return (
        f"no room for the checkpoint {target} ({what}). Nothing was half-written and earlier checkpoints are intact: "
        f"free some space, then continue with resume=auto"
    )
