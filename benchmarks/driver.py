"""Processor seconds and memory that the driver spends on a step's arrays, without engines, actor or verifier.

    python benchmarks/driver.py [--responses 2048] [--mean 4000 8192] [--out benchmarks/results/driver.json]

Each mean response length gets three fresh processes with one thread each, of which the one that took the fewest
processor seconds is shown; a busy machine adds to these. A process goes through one step of Lp-Reg with the
product's own code on made-up arrays: it unpickles the engines' answers group by group, grades them with a grader that
answers at once, builds the batch, scores, selects and updates with stub ranks, computes metrics and writes a dump.
Lengths are log-normal, cut off at four times the mean; groups have eight responses, and half of the groups have no
signal. The batch is pickled for the ranks as Ray does: arrays out of band, copied once.

Processor seconds leave out the work of the stubs. A phase's peak is the process's largest resident memory during that
phase, less the memory before the step (VmHWM of Linux). `arrays` is the size of the arrays and texts that are alive at
the end of the step; the target bounds the peak above that size.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep

MODEL = Path("tests/fixtures/models/Qwen3-14B-Base")
SAMPLES, SPREAD, PROMPT, VOCABULARY, RANKS, BUDGET = 8, 0.8, 200, 150_000, 8, 32_768
CHARACTERS, REPEATS = 3, 3
"""Characters of text per token, and processes per case."""
MEANS, TARGET_MEAN = [4000, 8192], 4000
SECONDS, GIB = 2.0, 0.6
"""Targets at the mean of 4,000 tokens and 2,048 responses: processor seconds, and peak memory above the arrays."""


class Meter:
    """Processor seconds and peak memory of phases. Work of the stubs is left out of the seconds."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}
        self.stubs = 0.0
        self.before = resident("VmRSS")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present memory
        start, stubs = time.process_time(), self.stubs
        yield
        seconds = time.process_time() - start - (self.stubs - stubs)
        peak, held = resident("VmHWM") - self.before, resident("VmRSS") - self.before
        old = self.phases.get(name, {"seconds": 0.0, "peak": 0.0})
        self.phases[name] = {"seconds": old["seconds"] + seconds, "peak": max(old["peak"], peak), "held": held}

    @contextmanager
    def stub(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.stubs += time.process_time() - start


def resident(field: str) -> int:
    """Bytes of resident memory: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# ---------------------------------------------------------------------- made-up answers


def draw_lengths(responses: int, mean: float) -> np.ndarray:
    random = np.random.default_rng(0)
    lengths = np.exp(SPREAD * random.standard_normal(responses) - SPREAD**2 / 2)
    lengths = np.minimum(4 * mean, mean * lengths)
    return np.maximum(1, lengths * (mean / lengths.mean())).astype(np.int64)


def write_answers(folder: Path, responses: int, mean: float) -> None:
    """Writes the answer to each prompt as one pickled list of responses."""
    from megatron_rl.types import Response

    random, lengths = np.random.default_rng(1), draw_lengths(responses, mean)
    for number in range(responses // SAMPLES):
        group = [
            Response(
                random.integers(0, VOCABULARY, length, dtype=np.int32),
                -random.exponential(0.3, length).astype(np.float32),
                "stop",
                0,
            )
            for length in lengths[number * SAMPLES : (number + 1) * SAMPLES]
        ]
        (folder / f"{number}.pickle").write_bytes(pickle.dumps(group, 5))


class PickledEngines:
    """Engines whose answers lie in a folder, as bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit(self, prompts: Sequence[Any], *_: Any) -> list[int]:
        return list(range(len(prompts)))

    def wait(self, numbers: Iterable[int]) -> set[int]:
        return set(numbers)

    def take(self, number: int) -> Any:
        return pickle.loads((self.folder / f"{number}.pickle").read_bytes())

    def abort(self, numbers: Iterable[int]) -> None: ...


class InstantGrader:
    """Gives every other group a signal, and each response a text of its own."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def score(self, samples: Sequence[Any]) -> list[Any]:
        from megatron_rl.types import RewardResult

        with self.meter.stub():
            signal = [i % 2 == 0 and i // SAMPLES % 2 == 0 for i in range(len(samples))]
            return [
                RewardResult(
                    float(right), "42", "correct", text=f"{i:012d}" + "x" * (CHARACTERS * len(sample.response))
                )
                for i, (sample, right) in enumerate(zip(samples, signal, strict=True))
            ]


def stub_actors(meter: Meter) -> Any:
    """`Actors` whose ranks answer at once, with values for an equal number of sequences each."""
    from megatron_rl.actor.interface import ActorRank
    from megatron_rl.actor.passes.results import Table as RankTable
    from megatron_rl.actor.passes.results import TrainResult
    from megatron_rl.batching.replicas import Sharing
    from megatron_rl.cluster import actors
    from megatron_rl.models.architecture import Architecture
    from megatron_rl.models.hf_format import read_config
    from megatron_rl.parallel.layout import Layout

    class StubActors(actors.Actors):
        def __init__(self) -> None:
            self.flops, self.sent_bytes = 0.0, 0
            self._model = Architecture.from_hf(read_config(MODEL))
            self._layout = Layout(data=RANKS)
            self._sharing = Sharing(RANKS, "packed", token_budget=BUDGET, even_length=1e4)
            self.ranks: Any = [SimpleNamespace(submit=self._answer) for _ in range(RANKS)]

        def _sent(self, part: Any, users: int) -> Any:
            buffers: list[pickle.PickleBuffer] = []
            head = pickle.dumps(part, 5, buffer_callback=buffers.append)
            store = bytearray(len(head) + sum(buffer.raw().nbytes for buffer in buffers))  # Ray's is shared memory
            end = 0
            for piece in (memoryview(head), *(buffer.raw() for buffer in buffers)):
                store[end : end + piece.nbytes] = piece
                end += piece.nbytes
            self.sent_bytes += len(store)
            return part

        def _answer(self, method: Any, part: Any, *args: Any, **_: Any) -> Any:
            with meter.stub():
                count = part.sequences.num_sampled_tokens
                values = {name: np.full(count, -0.25, np.float32) for name in ("log_probs", "entropy", "log_z")}
                table = RankTable(part.rows, values | {"in_filter": np.ones(count, bool)})
                sums = {"ratio": (1.0, 1.0), "selected_fraction": (1.0, 1.0)}
                return TrainResult(table, 0.1, sums, 1.0) if method is ActorRank.train else table

    actors.results = list  # type: ignore[attr-defined]  # the answers are there: nothing waits for Ray
    return StubActors()


# ---------------------------------------------------------------------- one step


def config_of(responses: int, mean: float) -> Any:
    from megatron_rl.config import Config

    return Config.model_validate(
        {
            "run": {"name": "x", "folder": "x"},
            "model": {"path": str(MODEL)},
            "data": {"train": "x.jsonl"},
            "rollout": {"prompts_per_step": responses // SAMPLES, "samples_per_prompt": SAMPLES}
            | {"max_response_tokens": int(4 * mean)},
            "reward": {"name": "math"},
            "train": {"steps": 1},
        }
    )


def step(responses: int, mean: float, folder: Path) -> dict[str, Any]:
    """One step of the driver on the answers in `folder`."""
    import torch

    from megatron_rl.actor.passes.policy_loss import LossChoice
    from megatron_rl.config.passes import passes_of
    from megatron_rl.data.cursor import Cursor
    from megatron_rl.observability.record import record
    from megatron_rl.reward.grading import Grading
    from megatron_rl.rollout.collector import RolloutCollector
    from megatron_rl.training.batch import training_batch
    from megatron_rl.training.learner import Learner
    from megatron_rl.training.metrics import policy_metrics, rollout_metrics
    from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
    from megatron_rl.training.selection import select, selection_overlap
    from megatron_rl.training.update import update
    from megatron_rl.types import Prompt

    torch.set_num_threads(1)
    config, prompt_ids = config_of(responses, mean), tuple(range(PROMPT))
    prompts = [Prompt(f"p:{i}", prompt_ids, "x" * PROMPT, "42") for i in range(responses // SAMPLES)]
    warm_up()
    meter = Meter()
    actors, grading = stub_actors(meter), Grading(InstantGrader(meter), config.reward)
    learner = Learner(config, actors, LossChoice.of(config.algorithm).make(), passes_of(config))
    collector = RolloutCollector(
        config,
        PickledEngines(folder),
        prompts,
        Cursor(len(prompts), 0, shuffle=False),
        grading,
        lambda step, draw: None,  # type: ignore[arg-type,return-value]
        lambda name: meter(f"collect: {name}"),
    )
    whole = time.process_time()
    rollouts = collector.collect(1, 0)
    with meter("batch"):
        batch, _ = training_batch(config, rollouts, grading.shaped)
    with meter("score"):
        batch = score_old_policy(learner, batch)
    with meter("select"):
        batch, _ = select(learner, batch, 1)
    with meter("score"):
        batch = score_reference(learner, score_lagged_policy(learner, 1, batch))
    with meter("update"):
        batch, _ = update(learner, 1, batch, lr=1e-6, seed=1)
    with meter("selection overlap"):
        selection_overlap(learner, batch)
    with meter("dump"):
        most = config.observability.rollouts_tokens
        record(folder, 1, rollouts, batch.sequences, batch.advantages, batch.scores, most_tokens=most)
    with meter("metrics"):
        rollout_metrics(rollouts, batch.advantages)
        policy_metrics(batch.sequences, batch.scores, batch.fresh)
    seconds = time.process_time() - whole - meter.stubs
    arrays = size_of_arrays([*answer_arrays(rollouts), *batch_arrays(batch)])
    arrays += sum(len(reward.text) for _, _, reward in rollouts.responses)
    return {
        "responses": responses,
        "mean": mean,
        "response_tokens": sum(len(response) for _, response, _ in rollouts.responses),
        "seconds": seconds,
        "arrays": arrays,
        "sent": actors.sent_bytes,
        "answers": sum(path.stat().st_size for path in folder.glob("*.pickle")),
        "peak_above_arrays": max(phase["peak"] for phase in meter.phases.values()) - arrays,
        "phases": meter.phases,
    }


def warm_up() -> None:
    """Loads what is loaded once per process: parquet, and torch's sort and histogram."""
    import pyarrow.parquet as pq
    import torch

    torch.bincount(torch.ones(8, dtype=torch.int64)).cumsum(0)
    pq.ParquetWriter  # noqa: B018


def answer_arrays(rollouts: Any) -> list[np.ndarray]:
    names = ("token_ids", "log_probs", "sampled_mask")
    return [getattr(response, name) for _, response, _ in rollouts.responses for name in names]


def batch_arrays(batch: Any) -> list[np.ndarray]:
    sequences = batch.sequences
    own = [sequences.token_ids, sequences.lengths, sequences.sampled_mask, batch.groups, batch.advantages, batch.fresh]
    return [*own, *sequences.values.values(), *batch.scores.values()]


def size_of_arrays(arrays: list[np.ndarray]) -> int:
    """Bytes, arrays that share memory counted once."""
    return sum({array.__array_interface__["data"][0]: array.nbytes for array in arrays}.values())


# ---------------------------------------------------------------------- processes and tables


def measure(responses: int, mean: int) -> dict[str, Any]:
    """Runs one step in each of some fresh processes, and returns the one that took the fewest processor seconds."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_answers(Path(folder), responses, mean)
        command = [sys.executable, __file__, "--work", str(responses), str(mean), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for _ in range(REPEATS):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    found = min(runs, key=lambda run: run["seconds"])
    found["seconds_of_all"] = [run["seconds"] for run in runs]
    found["peak_above_arrays"] = max(run["peak_above_arrays"] for run in runs)
    if (responses, mean) == (2048, TARGET_MEAN):
        found["met"] = found["seconds"] <= SECONDS and found["peak_above_arrays"] <= GIB * 2**30
    return found


def show(found: dict[str, Any]) -> None:
    title = f"{found['responses']} responses, mean {found['mean']} tokens"
    table = Table("phase", "processor s", "peak MiB", "held MiB", title=title, title_justify="left")
    for name, phase in found["phases"].items():
        table.add_row(name, f"{phase['seconds']:.2f}", *(f"{phase[key] / 2**20:.0f}" for key in ("peak", "held")))
    console = Console()
    console.print(table)
    verdict = {True: " (target met)", False: " (target missed)"}.get(found.get("met"), "")
    console.print(
        f"all phases {found['seconds']:.2f} s; arrays {found['arrays'] / 2**20:.0f} MiB, peak above them "
        f"{found['peak_above_arrays'] / 2**20:.0f} MiB{verdict}; sent to the actor {found['sent'] / 2**20:.0f} MiB",
        highlight=False,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--mean", type=int, nargs="+", default=MEANS, help="mean response lengths, in tokens")
    options = parser.parse_args()
    cases = []
    for mean in options.mean:
        cases.append(measure(options.responses, mean))
        show(cases[-1])
    targets = {"mean": TARGET_MEAN, "seconds": SECONDS, "gib_above_arrays": GIB}
    settings = {"samples": SAMPLES, "spread": SPREAD, "prompt": PROMPT, "ranks": RANKS, "threads": 1}
    keep(options.out, "driver", settings=settings, targets=targets, cases=cases)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(step(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main()
