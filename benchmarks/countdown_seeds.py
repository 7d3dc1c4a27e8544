"""GRPO and Lp-Reg on the quickstart, several seeds each, from the same warm start: the table of the README.

    python benchmarks/countdown_seeds.py [--seeds 3] [--out benchmarks/results/countdown_seeds.json]

Runs that exist already (runs/seeds-<algorithm>-<seed>) are read, not repeated. A run takes about 90 s on two quiet
cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from megatron_rl.observability.metrics import read_metrics

CONFIG = "examples/quickstart/countdown.yaml"
ALGORITHMS = ("grpo", "lp_reg")
ROWS = "actor.rows=packed"
"""The setting of the kept runs. With another packing, rounding differs, and so does the course of a run."""
MEASURES = ("avg@8", "pass@8", "entropy", "p_wait_after_no")
SUITES = ("held_out", "fresh")


def run(algorithm: str, seed: int) -> list[dict[str, Any]]:
    """Returns the metrics of the run's first and last evaluation, after training it if needed."""
    name = f"seeds-{algorithm}-{seed}"
    folder = Path("runs") / name
    if not (folder / "report.html").exists():
        overrides = [f"run.name={name}", f"algorithm.name={algorithm}", f"seed={seed}", "resume=auto", ROWS]
        subprocess.run([sys.executable, "-m", "megatron_rl.cli", "train", CONFIG, *overrides], check=True)
    evaluated = [row for row in read_metrics(folder) if f"eval/held_out/{MEASURES[0]}" in row]
    return [evaluated[0], evaluated[-1]]


def line(label: str, row: dict[str, Any]) -> str:
    cells = [f"{row[f'eval/{suite}/{measure}']:.3f}" for suite in SUITES for measure in MEASURES]
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/countdown_seeds.json"))
    options = parser.parse_args()
    results = {f"{a}, seed {s}": run(a, s) for a in ALGORITHMS for s in range(options.seeds)}
    heads = [f"{suite} {measure}" for suite in SUITES for measure in MEASURES]
    print("| run | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
    for label, (first, last) in results.items():
        print(line(f"{label}, step {first['step']}", first))
        print(line(f"{label}, step {last['step']}", last))
    kept = {
        label: [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]
        for label, rows in results.items()
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "config": CONFIG, "runs": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
