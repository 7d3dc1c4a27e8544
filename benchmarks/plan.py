"""Compares the times of `plan` with published ones, and finds the shares of published rates that explain these best.

    python benchmarks/plan.py [--out benchmarks/results/plan.json]

`published_steps.json` holds steps that NVIDIA measured with NeMo-RL on H100, with their settings. Three shares are
found by a search on a grid: of the matrix rate for dense models and for models with experts, and of the memory
bandwidth in decoding. They are the defaults of `megatron_rl/plan/assumptions.py`. To see whether they say anything
about a run that they were not fitted to, each case is also predicted by the shares that fit the other cases best, and
some cases are kept out of the search altogether. Nothing here was measured by this project.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep
from megatron_rl.config import load_config
from megatron_rl.config.schema import Config
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.published import known_config
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.parameters import model_parameters
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.setup import Setup
from megatron_rl.utils.hardware import GPUS as HARDWARE

PUBLISHED = Path(__file__).parent / "published_steps.json"
PROMPT, SAMPLES, UPDATE, GPUS = 104, 32, 512, 8
"""Mean prompt in tokens (see the file's `source`), samples per prompt, samples per update, and GPUs of a node."""
GRID = {
    "training": [0.30, 0.35, 0.40, 0.45],
    "experts": [0.06, 0.08, 0.10, 0.12, 0.15, 0.20],
    "decoding": [0.30, 0.35, 0.40, 0.45, 0.50, 0.60],
}
SYNC = Assumptions(mean_prompt=1, mean_response=1).sync
LIMIT = 0.25
"""Relative error up to which a case counts as met."""

Case = dict[str, Any]
Shares = dict[str, float]


def cases() -> list[Case]:
    return json.loads(PUBLISHED.read_text())["cases"]


def config_of(case: Case) -> Config:
    """Returns this project's configuration of the same run."""
    ranks, samples = case["actor_nodes"] * GPUS, case["prompts"] * SAMPLES
    engine_nodes = case["nodes"] - (0 if case["colocated"] else case["actor_nodes"])
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "model": {"path": case["model"]},
            "data": {"train": "train.jsonl", "max_prompt_tokens": 2 * PROMPT},
            "rollout": {
                "engine": "vllm",
                "engines": engine_nodes * GPUS // case["engine_tensor"],
                "prompts_per_step": case["prompts"],
                "samples_per_prompt": SAMPLES,
                "max_response_tokens": case["limit"] - PROMPT,
                "server": {
                    "tensor_parallel": case["engine_tensor"],
                    "arguments": ["--gpu-memory-utilization", str(case["memory"])],
                },
            },
            "reward": {"name": "math"},
            "algorithm": {"name": "grpo", "reference_kl": {"coefficient": 0.01}},
            "train": {"steps": 1, "updates_per_rollout": samples // UPDATE},
            "actor": {
                "dtype": "bfloat16",
                "tensor_parallel": case["tensor"],
                "sequence_parallel": case["tensor"] > 1,
                "pipeline_parallel": case["pipeline"],
                "data_parallel": ranks // case["tensor"] // case["pipeline"],
                "expert_parallel": case["expert"],
                "micro_batch_tokens": case["limit"],
                "recompute": {"granularity": case["recompute"]},
            },
            "cluster": {"nodes": case["nodes"], "colocate": case["colocated"]},
        }
        if not case["colocated"]:
            run["rollout"] |= {"asynchronous": True, "max_staleness": 1}
            run["algorithm"]["correction"] = {"weights": "truncated"}
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(run))
        return load_config(file, [])


@cache
def base_of(name: str) -> Setup:
    """Returns the setup of the case with this name, with lengths of its table and the default shares."""
    case = next(case for case in cases() if case["name"] == name)
    config, sizes = config_of(case), case.get("config") or known_config(Path(case["model"]))
    lengths = Assumptions(mean_prompt=PROMPT, mean_response=case["response"])
    return Setup(config, sizes, Architecture.from_hf(sizes), HARDWARE["h100"], lengths)


def predicted(case: Case, shares: Shares) -> float:
    """Returns the seconds of a step.

    A colocated run of NeMo-RL passes weights within each node through mapped memory, for which this project has no
    transport over several nodes. These cases are compared without a weight sync, which the table of NeMo-RL includes.
    """
    base = base_of(case["name"])
    plan = Plan(replace(base, assumed=replace(base.assumed, **shares)))
    return plan.step_seconds - (plan.seconds["weight sync"] if case["colocated"] else 0.0)


def fitted(chosen: list[Case]) -> Shares:
    """Returns the shares on the grid with the least sum of squared log ratios over the cases."""

    def loss(values: tuple[float, ...]) -> float:
        shares = dict(zip(GRID, values, strict=True))
        return sum(math.log(predicted(case, shares) / case["seconds"]) ** 2 for case in chosen)

    return dict(zip(GRID, min(product(*GRID.values()), key=loss), strict=True))


def syncs() -> list[Case]:
    """Returns the published weight syncs with the seconds that a plan gives one sender for as many bytes."""
    found = json.loads(PUBLISHED.read_text())["syncs"]
    network = HARDWARE["h100"].network
    for case in found:
        model = case.get("model")
        size = case["gigabytes"] * 1e9 if model is None else 2 * model_parameters(architecture(model))
        case |= {"share": size / case["seconds"] / network, "plan": size / network / SYNC}
    return found


def architecture(model: str) -> Architecture:
    return Architecture.from_hf(known_config(Path(model)))


def main() -> None:
    options = arguments(__doc__).parse_args()
    used = [case for case in cases() if not case.get("held_out")]
    best, found = fitted(used), []
    table = Table("case", "published s", "plan s", "error", "without it s", "error")
    for case in cases():
        held_out = case.get("held_out", False)
        others = best if held_out else fitted([other for other in used if other is not case])
        mine, left_out = predicted(case, best), predicted(case, others)
        errors = [seconds / case["seconds"] - 1 for seconds in (mine, left_out)]
        found.append({"name": case["name"], "held_out": held_out, "published": case["seconds"], "plan": mine})
        found[-1] |= {"without_it": left_out, "shares_without_it": others, "met": abs(errors[0]) <= LIMIT}
        name = case["name"] + (" (held out)" if held_out else "")
        table.add_row(
            name, f"{case['seconds']:g}", f"{mine:.0f}", f"{errors[0]:+.0%}", f"{left_out:.0f}", f"{errors[1]:+.0%}"
        )
    table.title = ", ".join(f"{name} {value:.2f}" for name, value in best.items())
    Console().print(table)
    sent = Table("weight sync over the network", "published s", "share of one adapter", "plan s")
    for case in syncs():
        sent.add_row(case["name"], f"{case['seconds']:g}", f"{case['share']:.2f}", f"{case['plan']:.1f}")
    Console().print(sent)
    keep(options.out, "plan", shares=best, cases=found, syncs=syncs())


if __name__ == "__main__":
    main()
