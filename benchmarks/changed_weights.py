"""The share of bf16 weights that a training step changes, which is what a sparse weight sync has to send.

    python benchmarks/changed_weights.py [--steps 10] [--lr 1e-6 1e-5] [--out benchmarks/results/changed_weights.json]
    python benchmarks/changed_weights.py --config examples/smollm2/lp_reg.yaml warm_start=null ... [--out FILE]

The runs are the quickstart's with another learning rate: its model after supervised training, its rollouts and
rewards, and Lp-Reg. `--config` names another run, and `KEY=VALUE` changes its settings; the page has the kept command
of SmolLM2. Every step leaves a checkpoint with the fp32 weights that the optimizer updates. Their bf16 rounding is what
the engines get, and the weights of every two steps after each other are compared bit by bit.

A weight changes if its update crosses the boundary between two bf16 numbers, so the share is about the mean of
|update| / (distance of bf16 numbers), which is printed beside it (`expected`). A run that starts from a model in bf16
starts in the middle between two boundaries: its first steps change fewer weights than `expected`, which is what later
ones change. A sparse sync that sends an index of four bytes with each value of two sends fewer bytes if less than a
third of the weights changes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep, kept_before
from megatron_rl.types import Sample

QUICKSTART = Path("examples/quickstart/countdown.yaml")
ENTRY_BYTES, WEIGHT_BYTES, MANTISSA = 6, 2, 8
"""Bytes of an index and a bf16 value, bytes of a value, and significant bits of bf16."""


def digits(sample: Sample) -> float:
    """A reward that differs between any two responses of a model that cannot do the task: the share of digits."""
    return sum(map(str.isdigit, sample.text)) / max(1, len(sample.text))


def train(folder: Path, config: Path, overrides: Sequence[str], lr: float, steps: int) -> Path:
    """Runs the steps; returns the folder of their checkpoints."""
    command = [sys.executable, "-m", "megatron_rl", "train", str(config), *overrides, "run.name=changed"]
    command += [f"run.folder={folder}", f"actor.optimizer.lr={lr}", f"train.steps={steps}", "evaluation.every=0"]
    command += ["train.save_every=1", f"train.keep_checkpoints={steps}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "checkpoints"


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the fp32 weights of a checkpoint by name."""
    found: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("weights-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    return found


def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Returns the share of weights whose bf16 rounding differs, overall and in the tensor with the most."""
    changed, total, expected, largest = 0, 0, 0.0, 0.0
    for name, old in before.items():
        new = after[name]
        differs = int((old.bfloat16().view(torch.int16) != new.bfloat16().view(torch.int16)).sum())
        _, exponent = torch.frexp(old)
        distance = torch.ldexp(torch.ones_like(old), exponent - MANTISSA)
        expected += float(((new - old).abs() / distance).clamp(max=1).sum())
        changed, total, largest = changed + differs, total + old.numel(), max(largest, differs / old.numel())
    return {"changed": changed / total, "expected": expected / total, "most_in_a_tensor": largest}


def measure(folder: Path, config: Path, overrides: Sequence[str], lr: float, steps: int) -> dict[str, Any]:
    checkpoints = train(folder, config, overrides, lr, steps)
    saved = (weights(checkpoints / f"step_{step:06}") for step in range(1, steps + 1))
    found, last = [], {}
    for before, last in pairwise(saved):
        found.append(compare(before, last))
    mean = {name: sum(step[name] for step in found) / len(found) for name in found[0]}
    sent = mean["changed"] * ENTRY_BYTES / WEIGHT_BYTES
    typical = torch.cat([tensor.abs().flatten() for tensor in last.values()]).median()
    run = {"config": str(config), "overrides": list(overrides), "lr": lr, "steps": found, "mean": mean}
    return run | {"bytes_over_full": sent, "median_weight": float(typical)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="other settings of the run")
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5])
    options = parser.parse_intermixed_args()
    table = Table("lr", "changed", "expected", "most in a tensor", "bytes of a sparse sync over a full one")
    known = kept_before(options.out, "runs") or []
    found = [run for run in known if run["config"] != str(options.config)]  # runs may be measured one by one
    for lr in options.lr:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder) / "run", options.config, options.overrides, lr, options.steps))
        mean, sent = found[-1]["mean"], found[-1]["bytes_over_full"]
        shares = (mean["changed"], mean["expected"], mean["most_in_a_tensor"], sent)
        table.add_row(f"{lr:g}", *(f"{share:.2%}" for share in shares))
    Console().print(table)
    keep(options.out, "changed_weights", runs=found)


if __name__ == "__main__":
    main()
