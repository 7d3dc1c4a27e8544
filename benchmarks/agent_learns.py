"""What the agent of docs/agents.md learns: the evaluations of a finished run, and its last policy with and without the
calculator.

    megatron-rl train examples/agents/calculator.yaml run.name=calculator
    megatron-rl eval runs/calculator --suites suites.yaml --out with        # the suite file of docs/agents.md
    megatron-rl eval runs/calculator --suites plain.yaml --out without      # the same without its line `agent`
    python benchmarks/agent_learns.py runs/calculator with without [--out FILE]

Without the agent, the policy also writes what comes after `calc`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import arguments, keep
from benchmarks.page import agent_learns
from megatron_rl.observability.metrics import read_metrics

METRICS = ("tool_calls_mean", "turns_mean", "avg@8", "pass@8", "entropy")


def evaluations(folder: Path) -> dict[str, dict[str, float]]:
    """Returns step -> metrics of every evaluation of a run on the fresh problems."""
    rows = [row for row in read_metrics(folder) if "eval/fresh/avg@8" in row]
    return {str(row["step"]): {name: row[f"eval/fresh/{name}"] for name in METRICS} for row in rows}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("own", type=Path, help="folder of the evaluation with the agent")
    parser.add_argument("without", type=Path, help="folder of the evaluation without it")
    options = parser.parse_args()
    rewards = [row["reward/mean"] for row in read_metrics(options.run) if "reward/mean" in row]
    found = {
        "config": "examples/agents/calculator.yaml",
        "evaluations": evaluations(options.run),
        "reward of ten steps": {"first": sum(rewards[:10]) / 10, "last": sum(rewards[-10:]) / 10},
        "last policy": {
            name: json.loads((folder / "summary.json").read_text())["suites"]["fresh"]
            for name, folder in (("with the calculator", options.own), ("without", options.without))
        },
    }
    print(agent_learns(found))
    keep(options.out, "agent_learns", **found)


if __name__ == "__main__":
    main()
