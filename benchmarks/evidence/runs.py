"""Training one run of the evidence, and what is kept of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import long_tail
from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.plan import Run
from megatron_rl.data.countdown import write_task
from megatron_rl.evaluation.measures import Measures
from megatron_rl.evaluation.problems import read_problems
from megatron_rl.observability.metrics import read_metrics, series

FOLDER = Path("runs/evidence")
PARTS = 10
"""Number of points of a kept curve."""
CURVES = {"entropy": "entropy/token_mean", "accuracy": "reward/mean", "length": "response_length/mean"}
REGULARISED = ("lpreg/lp_reg_selected_fraction", "lpreg/selected_fraction")
NOT_KEPT = ("checkpoints", "hf", "rollouts", "tensorboard", "candidates")
"""What is deleted from the folder of a finished run: 200 runs would fill a disk."""


def task(run: Run) -> list[str]:
    """Writes the task of a run unless it is there, and returns the overrides that train on it."""
    ending = f"-{run.warm_start}" if run.warm_start else ""
    folder = Path(f"runs/countdown-task{ending}")
    write_task(folder, seed=run.warm_start)
    model, reward = folder / "model", "countdown"
    phases = [(folder / "warm_start_a.parquet", 900, 0.002), (folder / "warm_start_b.parquet", 260, 0.0008)]
    if ARMS[run.arm].kind == "long tail":
        tail = Path(f"runs/countdown-tail{ending}")
        long_tail.write(tail, run.warm_start)
        model, reward = tail / "model", "benchmarks.evidence.long_tail:verify"
        phases.append((tail / "warm_start_c.parquet", long_tail.STEPS, 0.0008))
    traces = ", ".join(f"{{data: {file}, steps: {steps}, lr: {lr}}}" for file, steps, lr in phases)
    fresh = f"{{data: {folder}/fresh.jsonl, samples_per_prompt: {run.samples}}}"
    return [
        "prepare=null",
        f"model.path={model}",
        f"reward.name={reward}",
        f"data.train={folder}/train.jsonl",
        f"warm_start.phases=[{traces}]",
        f"evaluation.suites={{held_out: {folder}/held_out.jsonl, fresh: {fresh}}}",
    ]


def command(run: Run) -> list[str]:
    """Returns the command that trains the run, or continues it."""
    own = [f"run.name={run.name}", f"run.folder={FOLDER / run.name}", "resume=auto"]
    overrides = [*task(run), *run.overrides, *own]
    return [sys.executable, "-m", "megatron_rl.cli", "train", str(run.config), *overrides]


def start(run: Run) -> subprocess.Popen[bytes]:
    """Starts the training of a run, with its output in a file beside its folder."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{run.name}.log").open("ab") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command(run), stdout=output, stderr=subprocess.STDOUT, env=environment)


def outcome(run: Run) -> dict[str, Any]:
    """Returns what is kept of a finished run."""
    folder = FOLDER / run.name
    rows = read_metrics(folder)
    regularised = next((values for name in REGULARISED if (values := series(rows, name)[1])), None)
    return {
        "arm": run.arm,
        "warm_start": run.warm_start,
        "seed": run.seed,
        "steps": run.steps,
        "settings": list(run.settings),
        "before": at(run, rows, 0),
        "after": at(run, rows, -1),
        "curves": {label: curve(series(rows, metric)[1]) for label, metric in CURVES.items()},
        "regularised": None if regularised is None else float(np.mean(regularised)),
    }


def at(run: Run, rows: Any, place: int) -> dict[str, float]:
    """Returns the measures of an evaluation, the first (0) or the last (-1)."""
    folder = FOLDER / run.name

    def metric(name: str) -> float:
        return series(rows, f"eval/fresh/{name}")[1][place]

    evaluation = sorted((folder / "evaluations").glob("step_*"))[place]
    fresh, held_out = (Measures(read_problems(evaluation / f"{suite}.parquet")) for suite in ("fresh", "held_out"))
    noise = metric("p_hmm_after_no") + metric("p_so_after_no")
    if ARMS[run.arm].kind == "long tail":
        texts = [response.text.split() for problem in fresh.problems for response in problem.responses]
        noise = float(np.mean([any(map(long_tail.is_noise, words)) for words in texts]))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= fresh.k]
    return {
        "accuracy": fresh.avg.value,
        **{f"pass@{k}": fresh.pass_at(k).value for k in ks},
        "entropy": metric("entropy"),
        "length": metric("response_length"),
        "spark": metric("p_wait_after_no"),
        "noise": noise,
        "tuning": (held_out.avg.value + held_out.pass_at(8).value) / 2,
    }


def curve(values: list[float]) -> list[float]:
    """Returns the means of equal parts of a series."""
    return [float(part.mean()) for part in np.array_split(np.array(values), min(PARTS, len(values)))]
