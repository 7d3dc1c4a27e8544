"""What the agent of docs/agents.md learns: the evaluations of finished runs, with and without the calculator.

    megatron-rl train examples/agents/calculator.yaml run.name=with
    megatron-rl train examples/agents/calculator.yaml run.name=without rollout.agent=null
    python benchmarks/agent_learns.py runs/with runs/without [--out FILE]

Without the agent, the policy also writes what comes after `calc`. Both runs share the warm start.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments, keep
from benchmarks.page import agent_learns
from megatron_rl.observability.metrics import read_metrics

METRICS = ("avg@8", "pass@8", "tool_calls_mean", "turns_mean", "entropy")


def evaluations(folder: Path) -> dict[str, dict[str, float]]:
    """Returns step -> metrics of every evaluation of a run on the fresh problems."""
    found: dict[str, dict[str, float]] = {}
    for row in read_metrics(folder):
        if "eval/fresh/avg@8" in row:
            values = {name: row.get(f"eval/fresh/{name}") for name in METRICS}
            found[str(row["step"])] = {name: value for name, value in values.items() if value is not None}
    return found


def rewards(folder: Path, last: int = 10) -> dict[str, float]:
    """Returns the mean reward of the first and of the last steps."""
    values = [row["reward/mean"] for row in read_metrics(folder) if "reward/mean" in row]
    return {"first": sum(values[:last]) / last, "last": sum(values[-last:]) / last}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("runs", type=Path, nargs=2, help="folders of the runs with and without the agent")
    options = parser.parse_args()
    runs: dict[str, Any] = {
        name: {"evaluations": evaluations(folder), "reward": rewards(folder)}
        for name, folder in zip(("with the calculator", "without"), options.runs, strict=True)
    }
    found = {"config": "examples/agents/calculator.yaml", "runs": runs}
    print(agent_learns(found))
    keep(options.out, "agent_learns", **found)


if __name__ == "__main__":
    main()
