"""Compares the simulator with small real runs: `megatron-rl train` with one to four engines and replicas.

The runs sample the quickstart's warm-started model at temperature 3, so that lengths are as uneven as those of a
reasoning model (median 20 tokens, one response in twenty above 70, limit 200). Responses are graded by whether their
length is even, so that nearly all groups have a signal. The learning rate is next to zero, so that the distribution of
lengths stays the same.

Measurements come from runs with one engine, one replica and synchronous rollouts, at two sizes of a step: seconds of an
engine's forward and of a sequence in it, seconds of training and scoring per step and per token, and lengths. From
these alone, the simulator of the cluster's figures predicts the steps of every run. If there are more busy processes
than cores, they share the cores equally.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.progress import Progress

from benchmarks.scaling_simulator import Fleet, Lengths, LengthsOf, Rates, simulate
from megatron_rl.config import Config, load_config
from megatron_rl.config.passes import passes_of
from megatron_rl.rollout.dump import dumps
from megatron_rl.types import RewardResult, Sample

KEPT_BACK = ["rollout.over_sampling=1.25", "algorithm.correction.weights=truncated"]
MODES = {
    "synchronous": [],
    "over-sampled": ["rollout.over_sampling=1.25"],
    "partial": [*KEPT_BACK, "rollout.max_staleness=1"],
    "asynchronous": [*KEPT_BACK, "rollout.max_staleness=2", "rollout.asynchronous=true"],
}
QUICKSTART, FOLDER = Path("examples/quickstart/countdown.yaml"), Path("runs/benchmark-scaling")
PROCESSES, GROUPS, FEW_GROUPS = (1, 2, 4), 16, 4
STEPS, SETTLING = 9, 2
"""Steps of a run, and the first ones that are not counted. The last is not counted either, as no prompts are submitted
after it."""
SIMULATED_STEPS = 60
SAME = [
    *("rollout.temperature=3", "rollout.max_response_tokens=200", "actor.tensor_parallel=1", "evaluation.suites={}"),
    *("evaluation.probes={}", "train.save_every=0", "observability.view=plain", "actor.optimizer.lr=1e-9"),
    "reward.name=benchmarks.scaling_check:even_length",
]


def even_length(sample: Sample) -> RewardResult:
    """A reward that every group has some of."""
    return RewardResult(float(len(sample.response) % 2 == 0))


def overrides(processes: int, mode: str, groups: int = GROUPS) -> list[str]:
    sizes = [f"rollout.engines={processes}", f"actor.data_parallel={processes}", f"rollout.prompts_per_step={groups}"]
    return [*SAME, *MODES[mode], *sizes]


def train(name: str, settings: Sequence[str], *, record: bool = False) -> list[dict[str, float]]:
    """Trains a run and returns the metrics of the steps that are counted."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    own = [f"run.name={name}", f"run.folder={folder}", f"train.steps={STEPS}"]
    own += [f"observability.rollouts_every={int(record)}"]
    command = [sys.executable, "-m", "megatron_rl.cli", "train", str(QUICKSTART), *settings, *own]
    with (FOLDER / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log.name}")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [step for step in steps if SETTLING < step["step"] < STEPS]


def lengths_by_step(folder: Path) -> dict[int, list[Lengths]]:
    """Returns the lengths of the responses of every recorded group, by step."""
    found = {}
    for step, path in dumps(folder / "rollouts"):
        table = pq.read_table(path, columns=["group", "token_ids"])
        group = np.array(table["group"])
        length = np.array([len(tokens) for tokens in table["token_ids"].to_pylist()], dtype=np.int64)
        found[step] = [length[group == number] for number in np.unique(group)]
    return found


def recorded_lengths(folder: Path) -> LengthsOf:
    """Returns a function that draws the lengths of one of the run's groups for each row."""
    groups = [group for step in lengths_by_step(folder).values() for group in step]
    if not groups:
        raise SystemExit(f"{folder} has no recorded rollouts: record some with observability.rollouts_every=1")
    return lambda row: groups[np.random.default_rng(row).integers(len(groups))]


# ---------------------------------------------------------------------- measured with one process


@dataclass(frozen=True)
class Line:
    """seconds = fixed + each * count"""

    fixed: float
    each: float

    @classmethod
    def through(cls, counts: Sequence[float], seconds: Sequence[float]) -> Line:
        """Fits the line by least squares, with neither part below zero."""
        each, fixed = np.polyfit(counts, seconds, 1)
        if fixed < 0:
            return cls(0.0, float(np.sum(seconds) / np.sum(counts)))
        return cls(float(fixed), float(each)) if each > 0 else cls(float(np.mean(seconds)), 0.0)

    def at(self, count: float) -> float:
        return self.fixed + self.each * count


@dataclass(frozen=True)
class Measured:
    """Seconds that a process takes if it has a core of its own."""

    forward: Line
    """A forward pass of an engine, by number of sequences."""
    score: Line
    """A forward pass of the actor, by number of sampled tokens."""
    train: Line
    """An update, by number of sampled tokens."""
    other: float
    """Rewards, weight sync and the rest of a step."""

    def rest(self, config: Config, tokens: int) -> float:
        """Returns seconds of each replica in a step without its rollouts."""
        mine = tokens / config.actor.data_parallel
        return passes_of(config).forwards * self.score.at(mine) + self.train.at(mine) + self.other


def measure(progress: Callable[[], None]) -> tuple[Measured, dict[str, Any]]:
    rows: list[dict[str, float]] = []
    for groups in (FEW_GROUPS, GROUPS):
        name = f"1-synchronous-{groups}"
        settings = overrides(1, "synchronous", groups)
        steps, lengths = train(name, settings, record=True), lengths_by_step(FOLDER / name)
        calls = passes_of(load_config(QUICKSTART, settings)).forwards
        for step in steps:
            length = np.concatenate(lengths[int(step["step"])])
            parts = {part: step[f"perf/{part}_seconds"] for part in ("rollout", "score", "train", "record", "step")}
            other = parts.pop("step") - sum(parts.values())
            rows.append(
                parts
                | {
                    "other": other,
                    "forwards": int(length.max()),
                    "tokens": int(length.sum()),
                    "score": parts["score"] / calls,
                }
            )
        progress()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    tokens = columns["tokens"]
    # A rollout has one forward per token of its longest response; every other response is in the batch until it ends.
    per_forward = [t / f for t, f in zip(tokens, columns["forwards"], strict=True)]
    seconds = [s / f for s, f in zip(columns["rollout"], columns["forwards"], strict=True)]
    measured = Measured(
        forward=Line.through(per_forward, seconds),
        score=Line.through(tokens, columns["score"]),
        train=Line.through(tokens, columns["train"]),
        other=float(np.median(columns["other"])),
    )
    return measured, {"rows": rows}


# ---------------------------------------------------------------------- predicted, and compared


def predict(measured: Measured, processes: int, mode: str, lengths_of: LengthsOf, cores: int) -> dict[str, float]:
    config = load_config(QUICKSTART, [*overrides(processes, mode), f"train.steps={SIMULATED_STEPS + 1}"])
    each = measured.forward.each
    rates = Rates(lambda rows, _: measured.forward.at(rows), lambda prefixes: each * float(prefixes.sum()), 8.0)
    fleet = Fleet(processes, rates, embedded=True, ranks=processes, cores=cores)
    steps = simulate(config, fleet, lengths_of, lambda tokens: measured.rest(config, tokens), SIMULATED_STEPS)[
        SETTLING:
    ]
    return {
        "predicted": float(np.mean([step.whole for step in steps])),
        "predicted_rollout": float(np.mean([step.rollout for step in steps])),
    }


def check() -> dict[str, Any]:
    """Runs every mode with 1, 2 and 4 engines and as many replicas, and returns measured and predicted times."""
    cores, runs = os.cpu_count() or 1, []
    with Progress() as progress:
        task = progress.add_task("real runs", total=len(PROCESSES) * len(MODES) + 2)
        measured, table = measure(lambda: progress.advance(task))
        lengths = recorded_lengths(FOLDER / f"1-synchronous-{GROUPS}")
        for processes in PROCESSES:
            for mode in MODES:
                steps = train(f"{processes}-{mode}", overrides(processes, mode))
                whole = [step["perf/step_seconds"] - step.get("perf/record_seconds", 0.0) for step in steps]
                found = {"measured": float(np.mean(whole))}
                found["measured_rollout"] = float(np.mean([step["perf/rollout_seconds"] for step in steps]))
                said = predict(measured, processes, mode, lengths, cores)
                runs.append({"processes": processes, "mode": mode} | said | found | {"steps": whole})
                progress.advance(task)
    rates = {name: vars(value) if isinstance(value, Line) else value for name, value in vars(measured).items()}
    return {"cores": cores, "measured_with_one": rates | table, "runs": runs}
