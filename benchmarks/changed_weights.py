"""The share of bf16 weights that a training step changes, which is what a sparse weight sync would have to send.

    python benchmarks/changed_weights.py [--steps 10] [--lr 1e-6 1e-5] [--out benchmarks/results/changed_weights.json]

The runs are the quickstart's: its model after supervised training, its rollouts and rewards, and Lp-Reg, with another
learning rate. Every step leaves a checkpoint with the fp32 weights that the optimizer updates. Their bf16 rounding is
what the engines get, and the weights of every two steps after each other are compared bit by bit. A run takes about two
minutes on two quiet cores, most of which is supervised training; the second run reuses its result.

A weight changes if its update crosses the boundary between two bf16 numbers, so the share is about the mean of
|update| / (distance of bf16 numbers), which is printed beside it (`expected`). A sparse sync that sends an index of
four bytes with each value of two sends fewer bytes if less than a third of the weights changes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep

QUICKSTART = Path("examples/quickstart/countdown.yaml")
ENTRY_BYTES, WEIGHT_BYTES, MANTISSA = 6, 2, 8
"""Bytes of an index and a bf16 value, bytes of a value, and significant bits of bf16."""


def train(folder: Path, lr: float, steps: int) -> Path:
    """Runs the steps; returns the folder of their checkpoints."""
    command = [sys.executable, "-m", "megatron_rl", "train", str(QUICKSTART), "run.name=changed", "train.save_every=1"]
    command += [f"run.folder={folder}", f"actor.optimizer.lr={lr}", f"train.steps={steps}", "evaluation.every=0"]
    command += [f"train.keep_checkpoints={steps}"]
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


def measure(folder: Path, lr: float, steps: int) -> dict[str, Any]:
    checkpoints = train(folder, lr, steps)
    saved = [weights(checkpoints / f"step_{step:06}") for step in range(1, steps + 1)]
    found = [compare(before, after) for before, after in pairwise(saved)]
    mean = {name: sum(step[name] for step in found) / len(found) for name in found[0]}
    sent = mean["changed"] * ENTRY_BYTES / WEIGHT_BYTES
    typical = torch.cat([tensor.abs().flatten() for tensor in saved[-1].values()]).median()
    return {"lr": lr, "mean": mean, "bytes_over_full": sent, "median_weight": float(typical), "steps": found}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5])
    options = parser.parse_args()
    table = Table("lr", "changed", "expected", "most in a tensor", "bytes of a sparse sync over a full one")
    found = []
    for lr in options.lr:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder) / "run", lr, options.steps))
        mean, sent = found[-1]["mean"], found[-1]["bytes_over_full"]
        shares = (mean["changed"], mean["expected"], mean["most_in_a_tensor"], sent)
        table.add_row(f"{lr:g}", *(f"{share:.2%}" for share in shares))
    Console().print(table)
    keep(options.out, "changed_weights", settings={"steps": options.steps}, runs=found)


if __name__ == "__main__":
    main()
