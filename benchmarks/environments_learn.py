"""What small runs with environments and servers learn: the rewards and evaluations of finished runs.

    python examples/environments/tiny.py
    megatron-rl train examples/environments/tiny_sums.yaml run.name=reasoning-gym-sums
    PYTHONPATH=examples/environments megatron-rl train examples/environments/tiny_guess.yaml run.name=verifiers-guess
    megatron-rl train examples/agents/calculator.yaml train.steps=60 evaluation.every=60 \
        train.save_every=10 run.name=embedded-calculator
    megatron-rl train examples/agents/calculator.yaml rollout.engine=vllm train.steps=60 evaluation.every=60 \
        train.save_every=10 run.name=vllm-calculator
    megatron-rl train examples/agents/calculator.yaml rollout.engine=vllm warm_start.batch_size=64 train.steps=12 \
        evaluation.every=12 evaluation.samples_per_prompt=1 observability.rollouts_every=1 rollout.max_staleness=2 \
        rollout.over_sampling=2 rollout.asynchronous=true algorithm.correction.weights=truncated \
        run.name=vllm-asynchronous
    python benchmarks/environments_learn.py RUN... [--out FILE]

Runs of FILE that are not named stay in it; its commit and load are those of the last call.
The servers are those of `make engines`; verifiers and reasoning-gym those of `make sinks`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments, keep, kept_before
from benchmarks.page import environments_learn
from megatron_rl.observability.metrics import read_metrics
from megatron_rl.rollout.dump import dumps

ENDS = 5
"""Number of steps at the beginning and at the end whose mean reward is shown."""


def outcome(folder: Path) -> dict[str, Any]:
    """Returns what a run was, and what it learned."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = read_metrics(folder)
    steps = [row for row in metrics if "reward/mean" in row]
    rewards = [row["reward/mean"] for row in steps]
    scores = {
        name: [row[name] for row in metrics if name in row]
        for name in {key for row in metrics for key in row if key.startswith("eval/") and "/avg@" in key}
    }
    agent = config["rollout"].get("agent") or {}
    return {
        "engine": config["rollout"]["engine"],
        "agent": agent.get("function"),
        "seed": config["seed"],
        "steps": len(steps),
        "seconds": sum(row["perf/step_seconds"] for row in steps),
        "rewards": rewards,
        "first": sum(rewards[:ENDS]) / ENDS,
        "last": sum(rewards[-ENDS:]) / ENDS,
        "evaluations": {
            name: {"before": values[0], "after": values[-1] if len(values) > 1 else None}
            for name, values in scores.items()
        },
        "turns": [steps[0].get("agent/turns_mean"), steps[-1].get("agent/turns_mean")],
        "staleness": max(row["rollout/staleness_max"] for row in steps),
        "fresh log-prob difference": max(row.get("logprob/fresh_abs_diff", 0.0) for row in steps),
        "dumped": dumped(folder),
    }


def dumped(folder: Path) -> dict[str, int]:
    """Counts the rollouts in a run's dumps, those with tokens of several weight versions, and prompts trained twice."""
    rollouts = mixed = 0
    prompts: list[str] = []
    for _, path in dumps(folder / "rollouts"):
        rows = pq.read_table(path, columns=["prompt_id", "weight_versions"]).to_pylist()
        rollouts += len(rows)
        mixed += sum(len(set(row["weight_versions"])) > 1 for row in rows)
        prompts += {row["prompt_id"] for row in rows}
    return {"rollouts": rollouts, "of several versions": mixed, "prompts twice": len(prompts) - len(set(prompts))}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    options = parser.parse_args()
    kept = kept_before(options.out, "runs") or {}
    found = {"runs": kept | {folder.name: outcome(folder) for folder in options.runs}}
    print(environments_learn(found))
    keep(options.out, "environments_learn", **found)


if __name__ == "__main__":
    main()
