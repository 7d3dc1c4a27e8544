"""Memory and times that `megatron-rl plan` expects of the runs of docs/full-size.md, for three mean response lengths.

    python benchmarks/full_size.py --out benchmarks/results/full_size.json

Nothing is measured: the numbers follow from the recipes and from published rates, on any machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments
from megatron_rl.config import load_config
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.setup import Setup
from megatron_rl.utils.hardware import GIB, GPUS

ROOT = Path(__file__).parents[1]
RECIPES = (
    *("grpo_on", "lp_reg_paper_on", "lp_reg_reference_on", "entropy_bonus_on"),
    *("grpo_off", "lp_reg_paper_off", "dppo_off", "dppo_with_lp_reg_off"),
)
MODELS = {"qwen3-14b": "Qwen3-14B-Base", "qwen2.5-32b": "Qwen2.5-32B"}
RUNS = (*(f"qwen3-14b/{name}" for name in RECIPES), "qwen2.5-32b/lp_reg_reference_on_4_nodes")
LENGTHS = (1500, 3000, 5000)
"""Mean response lengths; the longest is 8,192."""


def planned(recipe: str) -> dict[str, Any]:
    """Returns what the plan says of a recipe on 32 H100."""
    model = ROOT / "tests/fixtures/models" / MODELS[recipe.partition("/")[0]]
    config = load_config(ROOT / f"examples/recipes/{recipe}.yaml", [f"model.path={model}"])
    plans = {n: Plan(Setup.of(config, GPUS["h100"], Assumptions(mean_prompt=200, mean_response=n))) for n in LENGTHS}
    engines = [plan.engine for plan in plans.values() if plan.engine is not None]
    if any(plan.problems or plan.gpus != 32 for plan in plans.values()):
        raise SystemExit(f"{recipe} is no run for 32 H100")
    return {
        "peak_gib": max(rank.peak for plan in plans.values() for rank in plan.actor) / GIB,
        "cache_tokens": min(engine.tokens for engine in engines),
        "steps": config.train.steps,
        "step_seconds": {str(n): plan.step_seconds for n, plan in plans.items()},
        "gpu_hours": {str(n): plan.gpu_hours for n, plan in plans.items()},
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    found = {"benchmark": "full_size", "lengths": LENGTHS, "runs": {recipe: planned(recipe) for recipe in RUNS}}
    text = json.dumps(found, indent=1) + "\n"
    print(text) if options.out is None else options.out.write_text(text)


if __name__ == "__main__":
    main()
