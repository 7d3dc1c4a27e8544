"""The demonstration for several seeds, all from one warm start: the table of docs/demonstration.md.

    python benchmarks/countdown_seeds.py [--seeds 0 1 2] [--set key=value ...] [--out FILE]

Each seed is what `make quickstart ARGS=seed=N` trains: GRPO and Lp-Reg at the same time, in runs/seeds-N. Runs that
have ended already are read, not repeated. A pair takes about two minutes on two quiet cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments, keep
from benchmarks.page import countdown_seeds
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
    """Returns of each measure: the means, the mean difference with its interval over seeds, how often Lp-Reg is higher,
    and how often by more than the interval over problems."""
    summary = {}
    for same in zip(*pairs, strict=True):
        differences = np.array([each.lp_reg - each.grpo for each in same])
        summary[same[0].label] = {
            "before": float(np.mean([each.before for each in same])),
            **{method: float(np.mean([getattr(each, method) for each in same])) for method in METHODS},
            "difference": asdict(estimate([differences])),
            "higher": int((differences > 0).sum()),
            "clearly_higher": sum(each.difference is not None and each.verdict == "ahead" for each in same),
            "seeds": len(same),
        }
    return summary


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="default: 0 to 9")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="key=value", help="for both methods")
    options = parser.parse_args()
    pairs = {str(seed): outcomes(trained(seed, options.overrides)) for seed in options.seeds}
    summary = over_seeds(list(pairs.values()))
    kept = {seed: {each.label: asdict(each) for each in found} for seed, found in pairs.items()}
    found = {"config": CONFIG.name, "overrides": options.overrides, "over_seeds": summary, "seeds": kept}
    print(countdown_seeds(found))
    keep(options.out, "countdown_seeds", **found)


if __name__ == "__main__":
    main()
