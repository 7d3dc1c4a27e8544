"""Simulates a step's time on 1 to 64 nodes for synchronous, over-sampled, partial and asynchronous rollouts.

    python benchmarks/scaling.py [--check] [--lengths runs/NAME] [--out benchmarks/results/scaling.json]

The recipes are the paper's for Qwen3-14B and Qwen2.5-32B: 2,048 responses per step, up to 8,192 tokens each. Half of
the H100s belong to the engines, half to the actor, which has one replica per node or per two nodes; if that does not
fit, the optimizer state is kept on the host. The times of decoding, prefill and the rest of a step come from the model
of `megatron-rl plan`. The product's own code decides which requests the engines get and when, on a simulated clock
(`scaling_simulator.py`). Lengths are log-normal, or those that a run of yours has recorded (`--lengths`, after
observability.rollouts_every=1).

synchronous     the step waits for its longest response
over-sampled    a quarter more prompts in flight; once enough groups are complete, the others are dropped
partial         the same, but the others continue at the next step, for one step at most
asynchronous    the same, for two steps at most, and engines continue while the actor trains

Nothing here has run on a cluster. `--check` predicts small real runs of one to four engines and replicas on this
machine from measurements with one, and compares (`scaling_check.py`; some minutes, on a quiet machine).
`benchmarks/page.py` writes the result into docs/benchmarks.md, with a picture.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.batching import LIMIT, MEAN, PROMPT
from benchmarks.machine import arguments, keep
from benchmarks.scaling_check import MODES, check, recorded_lengths
from benchmarks.scaling_simulator import Fleet, Lengths, LengthsOf, Rates, simulate
from megatron_rl.config import load_config
from megatron_rl.models.flops import body_flops
from megatron_rl.plan.assumptions import Assumptions, lengths
from megatron_rl.plan.engines import decoding_seconds, engine_memory
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.setup import Setup
from megatron_rl.plan.times import step_seconds
from megatron_rl.utils.hardware import GPUS


@dataclass(frozen=True)
class Recipe:
    file: Path
    model: Path
    nodes_a_replica: int
    """Number of nodes per replica of the actor, GPUs of the engines included."""


RECIPES = {
    "Qwen3-14B": Recipe(
        Path("examples/recipes/qwen3-14b/lp_reg_paper_on.yaml"), Path("tests/fixtures/models/Qwen3-14B-Base"), 1
    ),
    "Qwen2.5-32B": Recipe(
        Path("examples/recipes/qwen2.5-32b/lp_reg_paper_on.yaml"), Path("tests/fixtures/models/Qwen2.5-32B"), 2
    ),
}
NODES = (1, 2, 4, 8, 16, 32, 64)
SPREAD, STEPS, SETTLING = 0.6, 8, 3
"""Standard deviation of the logarithm of lengths; number of simulated steps, and of first ones that are not counted."""


def log_normal(samples: int) -> LengthsOf:
    middle = float(np.median(lengths(MEAN, SPREAD, LIMIT).values))

    def lengths_of(row: int) -> Lengths:
        values = np.exp(np.log(middle) + SPREAD * np.random.default_rng(row).standard_normal(samples))
        return np.minimum(LIMIT, np.ceil(values)).astype(np.int64)

    return lengths_of


def assumptions(recorded: LengthsOf | None) -> Assumptions:
    """Returns the plan's assumptions, with mean and spread of the recorded lengths if there are any."""
    if recorded is None:
        return Assumptions(PROMPT, MEAN, SPREAD)
    some = np.concatenate([recorded(row) for row in range(1000)])
    return Assumptions(PROMPT, float(some.mean()), float(np.log(some).std()))


def setup_of(recipe: Recipe, nodes: int, mode: str, assumed: Assumptions) -> Setup:
    sizes = [f"cluster.nodes={nodes}", f"rollout.engines={nodes}", "cluster.colocate=false"]
    sizes += [f"actor.data_parallel={nodes // recipe.nodes_a_replica}", f"model.path={recipe.model}"]
    for more in ([], ["actor.offload_optimizer=true"]):
        config = load_config(recipe.file, [*sizes, *more, *MODES[mode]])
        setup = Setup.of(config, GPUS["h100"], assumed)
        if not (problems := Plan(setup).problems):
            return setup
    raise RuntimeError(f"{recipe.file} on {nodes} nodes: {problems}")


def rates(setup: Setup) -> Rates:
    memory, engine, assumed = engine_memory(setup), setup.config.rollout.server, setup.assumed
    flops_rate = engine.tensor_parallel * setup.gpu.flops * assumed.prefill

    def decode(together: int, context: float) -> float:
        turns = max(1.0, together * context / memory.tokens)  # responses take turns if the cache holds fewer
        return turns * decoding_seconds(setup, memory, together / turns, context)

    def read(prefixes: np.ndarray) -> float:
        return body_flops(setup.model, float(prefixes.sum()), float((prefixes**2).sum())) / flops_rate

    return Rates(decode, read, assumed.mean_prompt)


def cluster_times(model: str, nodes: int, run: Path | None) -> dict[str, float]:
    """Returns seconds per step by mode, and `rest`: those of a synchronous step without its rollouts.

    `run`: folder of the run whose recorded lengths are used; None: log-normal lengths.
    """
    found: dict[str, float] = {}
    recorded = recorded_lengths(run) if run else None
    for mode in MODES:
        setup = setup_of(RECIPES[model], nodes, mode, assumptions(recorded))
        rest = sum(seconds for part, seconds in step_seconds(setup).items() if part != "rollout")
        found.setdefault("rest", rest)
        fleet = Fleet(nodes, rates(setup))
        lengths_of = recorded or log_normal(setup.config.rollout.samples_per_prompt)
        steps = simulate(setup.config, fleet, lengths_of, lambda _, seconds=rest: seconds, STEPS)
        found[mode] = float(np.mean([step.whole for step in steps[SETTLING:]]))
    return found


Found = dict[str, dict[int, dict[str, float]]]
"""Model, nodes, mode -> seconds."""


def show(found: Found, checked: dict[str, Any], console: Console) -> None:
    for model, by_nodes in found.items():
        title = f"{model}: seconds per step, simulated"
        table = Table("nodes", *MODES, "without rollouts", title=title, title_justify="left")
        for nodes, times in by_nodes.items():
            table.add_row(str(nodes), *(f"{times[name]:.0f}" for name in (*MODES, "rest")))
        console.print(table)
    if checked:
        table = Table("engines and replicas", "mode", "predicted s", "measured s", "measured / predicted")
        for row in checked["runs"]:
            cells = (f"{row['predicted']:.2f}", f"{row['measured']:.2f}", f"{row['measured'] / row['predicted']:.2f}")
            table.add_row(str(row["processes"]), row["mode"], *cells)
        console.print(table)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with small real runs too (some minutes)")
    parser.add_argument("--lengths", type=Path, default=None, help="folder of a run whose recorded lengths are used")
    options = parser.parse_args()
    found: Found = {model: {} for model in RECIPES}
    cases = [(model, nodes) for model, recipe in RECIPES.items() for nodes in NODES if nodes >= recipe.nodes_a_replica]
    with ProcessPoolExecutor() as pool:
        all_times = pool.map(cluster_times, *zip(*cases, strict=True), [options.lengths] * len(cases))
        for (model, nodes), times in zip(cases, track(all_times, "simulated", total=len(cases)), strict=True):
            found[model][nodes] = times
    checked = check() if options.check else {}
    show(found, checked, Console())
    assumed = {"spread": SPREAD, "mean": MEAN, "lengths": str(options.lengths or "log-normal")}
    keep(options.out, "scaling", settings=assumed, models=found, check=checked)


if __name__ == "__main__":
    main()
