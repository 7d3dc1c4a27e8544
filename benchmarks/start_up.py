"""Start-up time: of the help, of a plan, and of a quickstart run until its first step.

    python benchmarks/start_up.py [--out benchmarks/results/start_up.json]

Measures wall seconds of complete commands, the best of five, and processor seconds, which a busy machine disturbs less.
Every run needs at least the `import of torch and transformers`. If the quickstart's warm start is not cached, it is
trained first (some minutes, once). Then the run is started again, for one step: the time from the command to the line
of that step in metrics.jsonl.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep

CLI = [sys.executable, "-m", "megatron_rl.cli"]
QUICKSTART = "examples/quickstart/countdown.yaml"
PLAN = ["plan", "examples/recipes/qwen3-14b/lp_reg_paper_on.yaml", "model.path=tests/fixtures/models/Qwen3-14B-Base"]
COMMANDS = {
    "python, nothing": [sys.executable, "-c", ""],
    "megatron-rl --help": [*CLI, "--help"],
    "megatron-rl plan": [*CLI, *PLAN],
    "import of torch and transformers": [sys.executable, "-c", "import torch, transformers.modeling_utils"],
}
TARGETS = {"megatron-rl --help": 0.3, "megatron-rl plan": 1.0, "first step of the quickstart": 20.0}
REPEATS, FOLDER = 5, Path("runs/benchmark-start-up")


def command_seconds(command: list[str]) -> dict[str, float]:
    """Returns the best of `REPEATS` runs, after one that warms the caches."""
    walls, processors = [], []
    for _ in range(REPEATS + 1):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall": min(walls[1:]), "processor": min(processors[1:])}


def first_step() -> dict[str, float]:
    """Returns the time until the quickstart's first step is done, without evaluation, and until each earlier moment."""
    train = [*CLI, "train", QUICKSTART, f"run.folder={FOLDER}", "run.name=start-up", "observability.view=plain"]
    train += ["train.steps=1", "train.save_every=0", "evaluation.suites={}", "evaluation.probes={}"]
    shutil.rmtree(FOLDER, ignore_errors=True)
    start, moments = time.perf_counter(), {}
    process = subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    metrics, trained = FOLDER / "metrics.jsonl", False
    assert process.stdout is not None
    for line in process.stdout:
        for name, said in MOMENTS.items():
            if said in line and name not in moments:
                moments[name] = time.perf_counter() - start
        trained = trained or " steps in " in line
        if metrics.is_file() and metrics.stat().st_size and "first step" not in moments:
            moments["first step"] = metrics.stat().st_mtime - time.time() + time.perf_counter() - start
    if process.wait():
        raise RuntimeError(f"{' '.join(train)} failed")
    return first_step() if trained else moments


MOMENTS = {"inputs checked": "data: ", "actor started": "actor: ", "warm start loaded": "warm start, phase 2"}


def main() -> None:
    options = arguments(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {name: command_seconds(command) for name, command in COMMANDS.items()}
    moments = first_step()
    found["first step of the quickstart"] = {"wall": moments["first step"], "moments": moments}
    table = Table("", "wall s", "processor s", "target s", "")
    for name, row in found.items():
        target = TARGETS.get(name)
        met = "" if target is None else "met" if row["wall"] <= target else "missed"
        processor = f"{row['processor']:.2f}" if "processor" in row else ""
        table.add_row(name, f"{row['wall']:.2f}", processor, f"{target:g}" if target else "", met)
    Console().print(table, "first step:", ", ".join(f"{name} {at:.1f} s" for name, at in moments.items()))
    keep(options.out, "start_up", targets=TARGETS, found=found)


if __name__ == "__main__":
    main()
