"""What four methods do to rare tokens, off-policy on the quickstart: GRPO, DPPO, DPPO with Lp-Reg's term, and Lp-Reg.

    python benchmarks/rarity.py [--steps 30] [--out benchmarks/results/rarity.json]

The term's estimator is k3, as the metrics leave out the gradient of a KL over the whole vocabulary. Every run has the
same warm start, prompts and seed, and eight updates on each step's rollouts. The result has the means
over all steps of `lpreg/rarity/...` (see `lpreg.with_rarity_metrics`). The comparison runs/rarity.html has the figure.
Runs that exist already (runs/rarity-<method>) are read, not repeated. A run takes about a minute on two quiet cores.
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
from megatron_rl.observability.report import write_report
from megatron_rl.observability.report.rarity import EDGES, MEASURES, SIGNS, means

CONFIG = "examples/quickstart/countdown_off_policy.yaml"
TERM = "algorithm.with_lp_reg={rho: 0.05, kl_estimator: k3, require_below_proxy: false}"
METHODS = {
    "grpo": ["algorithm.name=grpo"],
    "dppo": ["algorithm.name=dppo"],
    "dppo-lp_reg": ["algorithm.name=dppo", TERM],
    "lp_reg": ["algorithm.name=lp_reg", "algorithm.lp_reg.kl_estimator=k3"],
}


def run(method: str, steps: int) -> Path:
    """Returns the folder of the run, which is trained first if needed."""
    name = f"rarity-{method}"
    folder = Path("runs") / name
    if not (folder / "report.html").exists():
        own = [f"run.name={name}", f"train.steps={steps}", "algorithm.rarity_metrics=true", "resume=auto"]
        command = [sys.executable, "-m", "megatron_rl.cli", "train", CONFIG, *METHODS[method], *own]
        subprocess.run(command, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rarity.json"))
    options = parser.parse_args()
    folders = {method: run(method, options.steps) for method in options.methods}
    found: dict[str, Any] = {method: means(read_metrics(folder)) for method, folder in folders.items()}
    for measure in MEASURES:
        for sign in SIGNS:
            print(f"\n{measure}, {sign} advantage\n{'p_old from':14}" + "".join(f"{method:>13}" for method in found))
            for edge in EDGES[:-1]:
                values = [values.get(f"{sign}/{edge:g}/{measure}") for values in found.values()]
                print(f"{edge:<14g}" + "".join(f"{'-' if value is None else f'{value:.4f}':>13}" for value in values))
    print(write_report(list(folders.values()), Path("runs/rarity.html")))
    kept = {"machine": machine(), "config": CONFIG, "steps": options.steps, "methods": options.methods, "means": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
