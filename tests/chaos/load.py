"""A long run of a tiny model, measured while it goes on: does it need more of anything with every step?

    python -m tests.chaos.load --out runs/load --steps 20000 --minutes 120 --result runs/load/load.json

Every few seconds, the command reads memory, file descriptors and threads of every kind of process, and the number and
size of the files that the run has; the seconds per step are those of metrics.jsonl. The result has a slope per 1,000
steps of each, with a 95 % interval over the means of BLOCKS equal parts, since neighbouring values are not independent.
The first tenth is left out: caches fill there.

SIGTERM, Ctrl-C and the end of the time stop the run after its step, with a checkpoint. The result is written anew every
minute, so that even SIGKILL leaves one, and the samples are kept in OUT/samples.jsonl. The same command goes on with
the run; its samples are then those of the new processes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_rl.observability.metrics import Row, read_metrics
from tests.chaos.faults import Scene, processes
from tests.chaos.world import World, state

BLOCKS = 20
T_95 = 2.10
"""The quantile of Student's t for BLOCKS - 2 degrees of freedom."""
SAMPLE_SECONDS, WRITE_SECONDS = 4.0, 60.0
LOAD = (
    "train.save_every=100",
    "train.keep_checkpoints=2",
    "observability.rollouts_every=100",
    "actor.tensor_parallel=1",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=2",
    "rollout.max_response_tokens=4",
)


def main() -> int:
    options = _options()
    world = World(options.out, undisturbed=False)
    until = time.monotonic() + 60 * options.minutes

    def stop(*_: object) -> None:
        nonlocal until
        until = 0.0

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with tempfile.TemporaryDirectory(prefix="mrll-") as temporary:
        process = world.start(
            "load",
            *LOAD,
            f"train.steps={options.steps}",
            "resume=auto",
            log=world.folder / "load.log",
            TMPDIR=temporary,
        )
        measured = Measured(world.folder, Path(temporary), process.pid)
        due = 0.0
        while process.poll() is None:
            measured.take()
            if time.monotonic() > until:
                process.send_signal(signal.SIGTERM)  # the run stops after its step, with a checkpoint
                until = float("inf")
            if time.monotonic() > due:
                _write(options, measured, None)
                due = time.monotonic() + WRITE_SECONDS
            time.sleep(SAMPLE_SECONDS)
    print(json.dumps(_write(options, measured, process.returncode), indent=1))
    return process.returncode


def _write(options: argparse.Namespace, measured: Measured, status: int | None) -> dict[str, Any]:
    rows = [row for row in read_metrics(measured.folder) if "perf/step_seconds" in row]
    result = {
        "steps": rows[-1]["step"] if rows else 0,
        "wanted steps": options.steps,
        "samples": len(measured.samples),
        "first measured step": measured.samples[0]["step"] if measured.samples else 0,
        "status": "in progress" if status is None else status,
        "machine": f"{os.cpu_count()} cores shared with other work, so that seconds are no measurement of speed",
        "slope per 1000 steps, and its 95 % interval": slopes(measured.samples) | slopes(_seconds(rows)),
    }
    fresh = options.result.with_suffix(".fresh")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(fresh, options.result)
    return result


def _seconds(rows: Sequence[Row]) -> list[dict[str, float]]:
    return [{"step": row["step"], "seconds per step": row["perf/step_seconds"]} for row in rows]


class Measured:
    """The samples of a run, in memory and in a file."""

    def __init__(self, out: Path, temporary: Path, driver: int) -> None:
        self.folder = out / "runs/load"
        self._temporary = temporary
        self._scene = Scene(driver, self.folder, None, False, None)
        self._file = out / "samples.jsonl"
        self._file.unlink(missing_ok=True)
        self.samples: list[dict[str, float]] = []

    def take(self) -> None:
        step = state(self.folder).get("step", 0)
        if not step:
            return
        sample = {"step": step} | _measured(self._scene)
        for name, folder in {"the run": self.folder, "TMPDIR": self._temporary}.items():
            sizes = _sizes(folder)
            sample[f"{name}: files"] = len(sizes)
            sample[f"{name}: MiB"] = sum(sizes) / 2**20
        self.samples.append(sample)
        with self._file.open("a") as file:
            file.write(json.dumps(sample) + "\n")


def _sizes(folder: Path) -> list[int]:
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                found.append(path.stat().st_size)
    return found


def _measured(scene: Scene) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind, there in processes(scene).items():
        for process in there:
            try:
                with process.oneshot():
                    values = {
                        "MiB": process.memory_info().rss / 2**20,
                        "descriptors": process.num_fds(),
                        "threads": process.num_threads(),
                    }
            except psutil.Error:
                continue
            for name, value in values.items():
                found[f"{kind}: {name}"] = found.get(f"{kind}: {name}", 0.0) + value
    return found


def slopes(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Returns name -> mean, slope per 1,000 steps and half the width of its interval; nothing for too few samples."""
    samples = samples[len(samples) // 10 :]
    if len(samples) < 2 * BLOCKS:
        return {}
    parts = np.array_split(np.arange(len(samples)), BLOCKS)
    names = sorted(set.intersection(*(set(sample) for sample in samples)) - {"step"})
    steps = np.array([np.mean([samples[i]["step"] for i in part]) for part in parts]) / 1000
    found = {}
    for name in names:
        means = np.array([np.mean([samples[i][name] for i in part]) for part in parts])
        centred = steps - steps.mean()
        slope = float(centred @ means / (centred @ centred))
        rest = means - means.mean() - slope * centred
        error = float(np.sqrt(rest @ rest / (BLOCKS - 2) / (centred @ centred)))
        found[name] = {"mean": round(float(means.mean()), 4), "slope": round(slope, 4), "±": round(T_95 * error, 4)}
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.load", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/load"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=120.0, help="time after which the run is stopped")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
