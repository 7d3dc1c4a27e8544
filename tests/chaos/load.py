"""A long run of a tiny model, measured while it goes on: does it need more of anything with every step?

    python -m tests.chaos.load --out runs/load --steps 20000 --minutes 120 --result runs/load/load.json

Twice a second, the command reads memory, file descriptors and threads of every kind of process, and the number of
files that the run has; the seconds per step are those of metrics.jsonl. The result has a slope per 1,000 steps of each,
with a 95 % interval over the means of BLOCKS equal parts, since neighbouring values are not independent. The first
tenth is left out: caches fill there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_rl.observability.metrics import read_metrics
from megatron_rl.observability.state import read_state
from tests.chaos.faults import Scene, processes
from tests.chaos.world import World

BLOCKS = 20
T_95 = 2.10
"""The quantile of Student's t for BLOCKS - 2 degrees of freedom."""
LOAD = ("train.save_every=100", "train.keep_checkpoints=2", "observability.rollouts_every=0", "run.name=load")


def main() -> int:
    options = _options()
    world = World(options.out, undisturbed=False)
    folder = world.folder / "runs/load"
    process = world.start("load", *LOAD, f"train.steps={options.steps}", "resume=auto", log=world.folder / "load.log")
    scene = Scene(process.pid, folder, None, False, None)
    samples: list[dict[str, float]] = []
    until = time.monotonic() + 60 * options.minutes
    while process.poll() is None:
        state = read_state(folder)
        if state is not None and state.step:
            samples.append({"step": state.step, **_measured(scene)})
        if time.monotonic() > until:
            process.send_signal(signal.SIGTERM)  # it stops after its step, with a checkpoint
            until = float("inf")
        time.sleep(0.5)
    rows = [row for row in read_metrics(folder) if "perf/step_seconds" in row]
    result = {
        "steps": rows[-1]["step"] if rows else 0,
        "wanted steps": options.steps,
        "samples": len(samples),
        "status": process.returncode,
        "machine": f"{os.cpu_count()} cores shared with other work, so that seconds are no measurement of speed",
        "slope per 1000 steps, and its 95 % interval": slopes(samples)
        | slopes([{"step": row["step"], "seconds per step": row["perf/step_seconds"]} for row in rows]),
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return process.returncode


def _measured(scene: Scene) -> dict[str, float]:
    found: dict[str, float] = {"files of the run": float(sum(len(files) for _, _, files in os.walk(scene.folder)))}
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
