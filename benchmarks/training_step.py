"""A training step of the quickstart on a CPU, compared with TRL's and with the same algorithm as a plain loop.

    python benchmarks/training_step.py [--steps 12] [--out benchmarks/results/training_step.json]

The first time, the quickstart is run for 24 steps and recorded (some minutes; its warm start is cached). Then all
contestants train on the recorded samples from the same weights, one thread each: GRPO's clipped loss as a mean over all
tokens, rewards less their group's mean, fp32, AdamW. All take the same steps, so their gradient norms must agree.

The contestants take turns, one step each per round, so that a busy machine slows all of them alike. A ratio of wall
times is the median over rounds of the ratio within a round. A ratio of processor times compares sums over the rounds,
with all processes of a contestant; other programs disturb it less. A second table shows whole steps, in which each
contestant also samples with its own generation, and grades.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep

RECORDING = Path("runs/benchmark-recorded")
RECORDED_STEPS, WARM_UP = 24, 2
STEPS = ("ours", "ours, one process", "ours, one process, packed rows", "plain loop", "TRL")
WHOLE = ("ours, with rollouts", "TRL, with rollouts")
TARGETS = [
    ("TRL", "ours, one process", "at least", 3.0),
    ("TRL", "ours", "at least", 3.0),
    ("ours, one process, packed rows", "plain loop", "at most", 1.10),
]
"""Processor time of the first contestant over that of the second."""
AGREEMENT = 2e-3
"""Largest relative difference of gradient norms that is allowed. Rounding errors grow as the weights drift apart."""

Found = dict[str, list[dict[str, Any]]]


def record() -> None:
    """Records real samples of the quickstart's policy, unless they exist."""
    if (RECORDING / "hf").is_dir():
        return
    from benchmarks.training_step_contestants import QUICKSTART, QUIET, SAME

    overrides = [f"run.name={RECORDING.name}", f"train.steps={RECORDED_STEPS}", "observability.rollouts_every=1"]
    command = [sys.executable, "-m", "megatron_rl.cli", "train", str(QUICKSTART), *SAME, *QUIET, *overrides]
    subprocess.run(command, check=True)


class Worker:
    def __init__(self, contestant: str, recording: Path, log: Path) -> None:
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--work", contestant, str(recording)],
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.log = log

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def measure(names: tuple[str, ...], recording: Path, steps: int, progress: Progress) -> Found:
    task = progress.add_task(", ".join(names), total=(steps + WARM_UP) * len(names))
    logs = Path("runs/benchmarks")
    logs.mkdir(parents=True, exist_ok=True)
    workers = {
        name: Worker(name, recording, logs / f"{name.replace(', ', '-').replace(' ', '-')}.log") for name in names
    }
    found: Found = {name: [] for name in names}
    for _ in range(WARM_UP + steps):
        for name, worker in workers.items():
            found[name].append(worker.step())
            progress.advance(task)
    for worker in workers.values():
        worker.close()
    return found


def ratio(found: Found, over: str, under: str, what: str) -> float:
    above, below = ([step[what] for step in found[name][WARM_UP:]] for name in (over, under))
    if what == "cpu":  # counted in ticks of 10 ms
        return sum(above) / sum(below)
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def summary(found: Found) -> dict[str, Any]:
    own = next(iter(found))
    rows: dict[str, Any] = {}
    for name, steps in found.items():
        rows[name] = {what: statistics.median(step[what] for step in steps[WARM_UP:]) for what in ("wall", "cpu")}
        rows[name] |= {f"{what}_to_ours": ratio(found, name, own, what) for what in ("wall", "cpu")}
        if phases := [step["phases"] for step in steps[WARM_UP:] if "phases" in step]:
            rows[name]["phases"] = {p: statistics.median(each.get(p, 0.0) for each in phases) for p in phases[0]}
    return rows


def disagreement(found: Found) -> float:
    """Returns the largest relative difference of a step's gradient norm between contestants."""
    norms = [[step["grad_norm"] for step in steps] for steps in found.values()]
    return max(max(step) / min(step) - 1 for step in zip(*norms, strict=True))


def positions(recording: Path) -> dict[str, float]:
    """Returns the mean number of positions per step: of the sequences with an advantage, with shared prefixes once
    ("ours") and packed; and of all sequences, as TRL pads them."""
    from benchmarks.training_step_contestants import Recorded, batch_of, quickstart
    from megatron_rl.batching.prefix_tree import PrefixTree

    config, steps = quickstart(), Recorded(recording).steps
    batches = [batch_of(config, rollouts)[0] for rollouts in steps]
    ours = [PrefixTree.of(batch.sequences).size for batch in batches]
    packed = [int((batch.lengths - 1).sum()) for batch in batches]
    padded = []
    for rollouts in steps:
        prompts, responses, _ = zip(*rollouts.responses, strict=True)
        padded.append(len(responses) * (max(len(p.token_ids) for p in prompts) + max(map(len, responses))))
    return {name: statistics.mean(of) for name, of in (("ours", ours), ("packed", packed), ("TRL", padded))}


def show(title: str, rows: dict[str, Any], console: Console) -> None:
    table = Table("", "wall s", "processor s", "wall / ours", "processor / ours", title=title, title_justify="left")
    for name, row in rows.items():
        cells = (row["wall"], row["cpu"], row["wall_to_ours"], row["cpu_to_ours"])
        table.add_row(name, *(f"{cell:.3f}" for cell in cells))
    console.print(table)
    for name, row in rows.items():
        if "phases" in row:
            parts = ", ".join(f"{phase} {seconds * 1e3:.0f}" for phase, seconds in row["phases"].items())
            console.print(f"{name}, wall ms of the phases: {parts}", highlight=False)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=12, help=f"steps of each, at most {RECORDED_STEPS - WARM_UP}")
    parser.add_argument("--recording", type=Path, default=None, help="folder of a run with rollouts and hf")
    options = parser.parse_args()
    if options.recording is None:
        record()
    recording = options.recording or RECORDING
    with Progress() as progress:
        steps = measure(STEPS, recording, options.steps, progress)
        whole = measure(WHOLE, recording, options.steps, progress)
    console, apart, run = Console(), disagreement(steps), positions(recording)
    tables = {"training step": summary(steps), "whole step": summary(whole)}
    for title, rows in tables.items():
        show(title, rows, console)
    console.print(f"gradient norms agree to {apart:.1e}", highlight=False)
    said = f"positions per step: ours {run['ours']:.0f}, packed {run['packed']:.0f}, TRL {run['TRL']:.0f}"
    console.print(said, highlight=False)
    if not apart < AGREEMENT:
        raise SystemExit(f"the contestants do not take the same steps: their gradient norms differ by {apart:.1e}")
    verdicts = []
    for over, under, sense, bound in TARGETS:
        value = ratio(steps, over, under, "cpu")
        met = value >= bound if sense == "at least" else value <= bound
        verdicts.append({"of": over, "over": under, "value": value, "target": f"{sense} {bound:g}", "met": met})
        console.print(
            f"{over} / {under}: {value:.2f} ({sense} {bound:g}: {'met' if met else 'missed'})", highlight=False
        )
    settings = {"steps": options.steps, "threads": 1}
    apart_and_run = {"gradient_norms_apart": apart, "positions": run}
    keep(options.out, "training_step", settings=settings, tables=tables, targets=verdicts, **apart_and_run)


def work(contestant: str, recording: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries goes to the log
    import torch

    from benchmarks.training_step_contestants import CONTESTANTS, Pace

    torch.set_num_threads(1)
    CONTESTANTS[contestant](Pace(answers), recording)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
