"""The demonstration for several seeds, all from one warm start: the table of docs/demonstration.md.

    python benchmarks/countdown_seeds.py [--seeds 10] [--out benchmarks/results/countdown_seeds.json] [key=value ...]

Each seed is what `make quickstart ARGS=seed=N` trains: GRPO and Lp-Reg at the same time, in runs/seeds-N. Runs that
have ended already are read, not repeated. A pair takes about two minutes on two quiet cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments, keep
from examples.quickstart.comparison import METHODS, Outcome, outcomes
from examples.quickstart.demonstration import CONFIG, train, watched
from examples.quickstart.progress import Progress
from megatron_rl.config import load_config
from megatron_rl.evaluation.measures import estimate


def trained(seed: int, overrides: Sequence[str]) -> dict[str, Path]:
    """Returns the folder of each method's run with this seed, after training what has not ended yet."""
    config = load_config(CONFIG, list(overrides))
    runs = watched(Path("runs") / f"seeds-{seed}", config.train.steps)
    missing = {method: run for method, run in runs.items() if not (run.folder / "report.html").exists()}
    progress = Progress([*missing.values()], Console())
    if missing and train(missing, [*overrides, f"seed={seed}", "resume=auto"], progress):
        raise SystemExit(f"seed {seed} was not trained to its end")
    return {method: run.folder for method, run in runs.items()}


def over_seeds(pairs: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Returns of each measure: the means, the mean difference with its interval over seeds, and how often Lp-Reg is
    higher."""
    summary = {}
    for same in zip(*pairs, strict=True):
        differences = np.array([each.lp_reg - each.grpo for each in same])
        summary[same[0].label] = {
            "before": float(np.mean([each.before for each in same])),
            **{method: float(np.mean([getattr(each, method) for each in same])) for method in METHODS},
            "difference": asdict(estimate([differences])),
            "higher": int((differences > 0).sum()),
            "seeds": len(same),
        }
    return summary


def table(pairs: Sequence[Sequence[Outcome]], summary: dict[str, Any]) -> list[str]:
    """Returns the table in Markdown: GRPO beside Lp-Reg, a row per seed, and a last row of means."""
    labels = list(summary)
    lines = ["| seed | " + " | ".join(f"{label}: GRPO | Lp-Reg" for label in labels) + " |"]
    lines.append("|---" * (1 + 2 * len(labels)) + "|")
    for seed, found in enumerate(pairs):
        lines.append(f"| {seed} | " + " | ".join(f"{each.grpo:.3f} | {each.lp_reg:.3f}" for each in found) + " |")
    means = (f"**{summary[label]['grpo']:.3f}** | **{summary[label]['lp_reg']:.3f}**" for label in labels)
    return [*lines, "| mean | " + " | ".join(means) + " |"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for both methods")
    options = parser.parse_args()
    pairs = [outcomes(trained(seed, options.overrides)) for seed in range(options.seeds)]
    summary = over_seeds(pairs)
    print("\n".join(table(pairs, summary)))
    print(json.dumps(summary, indent=1))
    kept = {str(seed): {each.label: asdict(each) for each in found} for seed, found in enumerate(pairs)}
    found = {"config": CONFIG.name, "overrides": options.overrides, "over_seeds": summary, "seeds": kept}
    keep(options.out, "countdown_seeds", **found)


if __name__ == "__main__":
    main()
