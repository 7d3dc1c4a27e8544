"""The place of chaos: a task that an untrained model learns, the undisturbed run, and disturbed runs beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_rl.data.countdown import write_task
from megatron_rl.observability.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples/quickstart/countdown.yaml"
STEPS, SAVE_EVERY = 60, 4
SMALL = (
    "evaluation.suites={}",
    "evaluation.probes={}",
    "rollout.engines=1",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "observability.view=plain",
    "reward.name=tests.engines.reward:odd",
)
SETTINGS = (
    f"train.save_every={SAVE_EVERY}",
    "train.keep_checkpoints=3",
    "observability.hang_seconds=60",
    "observability.rollouts_every=1",
)
RUN = (f"train.steps={STEPS}", *SETTINGS)
EMBEDDED = "transformers"
SERVER_STEPS = 24
SERVERS = (
    "actor.tensor_parallel=1",
    "rollout.server.hang_seconds=20",
    "rollout.server.request_timeout_seconds=30",
    "rollout.server.update_timeout_seconds=30",
)
ROUTED = "rollout.server.router=round_robin"
OF_THE_MACHINE = ("time", "perf/", "memory/", "logprob/contract")
"""Beginnings of metrics that differ between equal runs: times, and the contract, which is checked at every start."""


@dataclass(frozen=True)
class Result:
    """What a finished run left that must not depend on its faults."""

    curve: list[dict[str, Any]]
    """Rows of metrics.jsonl without those of the machine; of a run with servers, whose log-probs round differently from
    run to run, the steps and what each has trained on."""
    weights: str
    """SHA-256 of the exported model; "" of a run with servers."""

    @classmethod
    def of(cls, folder: Path) -> Result:
        rows = [
            {name: value for name, value in row.items() if not name.startswith(OF_THE_MACHINE)}
            for row in read_metrics(folder)
        ]
        return cls(rows, hashlib.sha256((folder / "hf/model.safetensors").read_bytes()).hexdigest())

    @classmethod
    def ledger(cls, folder: Path) -> Result:
        """Of a run with servers: the prompts of each step, their number of samples and the versions of all tokens."""
        rows = []
        for row in read_metrics(folder):
            entry: dict[str, Any] = {"step": row["step"]}
            if row["step"]:
                dump = pq.read_table(
                    folder / f"rollouts/step_{row['step']:06d}.parquet", columns=["prompt_id", "weight_versions"]
                ).to_pylist()
                entry["samples of each prompt"] = Counter(str(sample["prompt_id"]) for sample in dump)
                entry["weight versions"] = sorted({one for sample in dump for one in sample["weight_versions"]})
                entry["the engine has the actor's weights"] = row["logprob/rollout_actor_abs_diff"] < 1e-4
            rows.append(entry)
        return cls(rows, "")

    def difference(self, other: Result) -> str:
        """Says how the two differ; "" if they are equal to the bit."""
        steps = [[row["step"] for row in result.curve] for result in (self, other)]
        if steps[0] != steps[1]:
            return f"the steps are {steps[1]} instead of {steps[0]}"
        for mine, theirs in zip(self.curve, other.curve, strict=True):
            if names := [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]:
                return f"step {mine['step']} has other values of {', '.join(sorted(names)[:4])}"
        return "" if self.weights == other.weights else "the exported weights are others"


class World:
    """A folder with the task, the model, the undisturbed run, and a folder `runs` for the disturbed ones."""

    def __init__(self, folder: Path, *, engine: str = EMBEDDED, undisturbed: bool = True) -> None:
        """engine: transformers, vllm, sglang, or `router` for SGLang behind its router. undisturbed: whether the
        undisturbed run is needed, and run where it is missing."""
        self.embedded = engine == EMBEDDED
        self.engine = "sglang" if engine == "router" else engine
        self.steps = STEPS if self.embedded else SERVER_STEPS
        servers = () if self.embedded else (*SERVERS, *([ROUTED] if engine == "router" else []))
        self.settings = (f"train.steps={self.steps}", *SETTINGS, *servers)
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "runs/countdown-task/train.jsonl").is_file():
            write_task(self.folder / "runs/countdown-task")
        if not undisturbed:
            return
        if not (self.folder / "runs/undisturbed/hf").is_dir():
            self._finish("undisturbed", *self.settings)
        self.expected = self.result(self.folder / "runs/undisturbed")

    def result(self, folder: Path) -> Result:
        return Result.of(folder) if self.embedded else Result.ledger(folder)

    def command(self, name: str, *overrides: str) -> list[str]:
        config = QUICKSTART if self.embedded else QUICKSTART.with_name(f"countdown_{self.engine}.yaml")
        program = [sys.executable, "-m", "megatron_rl.cli", "train", str(config)]
        return [*program, f"run.name={name}", "warm_start=null", *SMALL, *overrides]

    def start(
        self, name: str, *overrides: str, shm: Path | None = None, network: str = "", log: Path, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Starts a run. shm: a folder that takes the place of /dev/shm. network: name of a network namespace. Both are
        for root only."""
        command = self.command(name, *overrides)
        if shm is not None:
            mount = f"mount --bind {shlex.quote(str(shm))} /dev/shm && exec {shlex.join(command)}"
            command = ["unshare", "--mount", "sh", "-c", mount]
        if network:
            command = ["ip", "netns", "exec", network, *command]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}
        with log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def _finish(self, name: str, *overrides: str) -> None:
        log = self.folder / f"{name}.log"
        if status := self.start(name, *overrides, log=log).wait():
            raise RuntimeError(f"the run {name} ended with status {status}: {log}")


def state(folder: Path) -> dict[str, Any]:
    """Returns the content of the run's state.json; nothing if there is none yet."""
    try:
        found = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
