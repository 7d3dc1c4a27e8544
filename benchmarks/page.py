"""Writes the kept results into the pages of `PAGES`, between their markers.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAMES = ("benchmarks.md", "demonstration.md", "agents.md", "environments.md", "evidence.md", "full-size.md")
PAGES = tuple(ROOT / "docs" / name for name in NAMES)
RESULTS, SCALING, SEEDS = ROOT / "benchmarks/results", ROOT / "docs/scaling.svg", ROOT / "docs/demonstration.svg"
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Found = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def where(found: Found) -> str:
    machine, loads = found["machine"], found["load_average"]
    load = (loads["after"] if isinstance(loads, dict) else loads)[0]
    return f"\n{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; load {load:.1f} at the end.\n"


def batching(found: Found) -> str:
    head = ("spread", "sequences per update", "DP", "imbalance, median", "worst", "padding", "in order", "side by side")
    rows = (
        [
            *(f"{case[name]}" for name in ("spread", "rows", "replicas")),
            *(f"{case[name]:.1%}" for name in ("imbalance", "imbalance_worst", "padding_worst")),
            *(f"{case[name]:.0%}" for name in ("imbalance_in_order", "padding_side_by_side")),
        ]
        for case in found["cases"]
    )
    return table(head, rows)


def training_step(found: Found) -> str:
    text = ""
    for title, rows in found["tables"].items():
        parts = (
            [
                name,
                *(f"{row[key]:.3f}" for key in ("wall", "cpu")),
                f"{row['wall_to_ours']:.2f}",
                f"{row['cpu_to_ours']:.2f}",
            ]
            for name, row in rows.items()
        )
        text += table((title, "wall s", "processor s", "wall / ours", "processor / ours"), parts) + "\n"
    phases = next(iter(found["tables"]["whole step"].values()))["phases"]
    text += (
        table(("phase of ours, with rollouts", "wall ms"), ([n, f"{s * 1e3:.0f}"] for n, s in phases.items())) + "\n"
    )
    for target in found["targets"]:
        met = "met" if target["met"] else "**missed**"
        text += (
            f"- {target['of']} / {target['over']}, processor time: {target['value']:.2f} ({target['target']}: {met})\n"
        )
    run = found["positions"]
    return text + f"- positions per step: ours {run['ours']:.0f}, packed {run['packed']:.0f}, TRL {run['TRL']:.0f}\n"


def weight_sync(found: Found) -> str:
    rows = []
    for layout, each in found["layouts"].items():
        for transport, bare in each["bare"].items():
            seconds, size = each["seconds"][transport], each["bytes"] / 1e9
            rates = (f"{size / seconds:.2f}", f"{size / bare:.2f}", f"{bare / seconds:.0%}")
            rows.append([layout, transport, f"{size:.2f}", f"{seconds:.2f}", *rates])
    return table(("layout", "transport", "GB", "seconds", "GB/s", "bare GB/s", "share"), rows)


def changed_weights(found: Found) -> str:
    head = ("run", "learning rate", "changed", "expected", "most in a tensor", "bytes, of a whole update's")
    rows = []
    for run in found["runs"]:
        mean = run["mean"]
        shares = (f"{100 * mean[name]:.3f} %" for name in ("changed", "expected", "most_in_a_tensor"))
        rows.append((run["config"], f"{run['lr']:g}", *shares, f"{100 * run['bytes_over_full']:.2f} %"))
    return table(head, rows)


def start_up(found: Found) -> str:
    rows = []
    for name, row in found["found"].items():
        processor = f"{row['processor']:.2f}" if "processor" in row else ""
        target = found["targets"].get(name)
        rows.append([name, f"{row['wall']:.2f}", processor, f"{target:g}" if target else ""])
    moments = found["found"]["first step of the quickstart"]["moments"]
    said = ", ".join(f"{name} {at:.1f} s" for name, at in moments.items())
    return table(("", "wall s", "processor s", "target s"), rows) + f"\nOn the way to the first step: {said}.\n"


def driver(found: Found) -> str:
    cases = found["cases"]
    head = ["phase", *(f"mean {case['mean']:,}: processor s" for case in cases)]
    rows = [[name, *(f"{case['phases'][name]['seconds']:.2f}" for case in cases)] for name in cases[0]["phases"]]
    rows.append(["all", *(f"{case['seconds']:.2f}" for case in cases)])
    rows.append(["arrays, GiB", *(f"{case['arrays'] / 2**30:.2f}" for case in cases)])
    rows.append(["peak above them, GiB", *(f"{case['peak_above_arrays'] / 2**30:.2f}" for case in cases)])
    return table(head, rows)


def grading(found: Found) -> str:
    def share(counts: dict[str, int]) -> str:
        return f"{counts['as they should be']:,} of {counts['graded']:,}"

    rows = []
    for name, row in found["sets"].items():
        left_out = sum(row["labels left out"].values())
        changes = sum(row["changes left out"].values())
        checks = (share(row[check]) for check in ("itself", "respelled", "perturbed"))
        rows.append([name, f"{row['rows']:,}", f"{left_out}", f"{row['labels']:,}", *checks, f"{changes}"])
    head = (
        "set",
        "rows",
        "left out",
        "different labels",
        "itself: right",
        "respelled: right",
        "perturbed: refused",
        "changes left out",
    )
    return table(head, rows)


def scaling(found: Found) -> str:
    from benchmarks.scaling_picture import picture

    picture(found["models"], SCALING)
    modes = ("synchronous", "over-sampled", "partial", "asynchronous")
    text = f"![seconds per step against the number of nodes, simulated]({SCALING.name})\n\n"
    for model, by_nodes in found["models"].items():
        rows = ([nodes, *(f"{times[name]:.0f}" for name in (*modes, "rest"))] for nodes, times in by_nodes.items())
        text += table((f"{model}, nodes", *modes, "without rollouts"), rows) + "\n"
    if not found["check"]:
        return text + "(No check against real runs is kept yet: it needs a quiet machine.)\n"
    rows = (
        [
            f"{row['processes']}",
            row["mode"],
            *(f"{row[key]:.2f}" for key in ("predicted", "measured")),
            f"{row['measured'] / row['predicted']:.2f}",
            *(f"{row[key]:.2f}" for key in ("predicted_rollout", "measured_rollout")),
        ]
        for row in found["check"]["runs"]
    )
    head = ("engines and replicas", "real runs", "step predicted s", "measured s", "measured / predicted")
    over = sorted(row["measured"] / row["predicted"] for row in found["check"]["runs"])
    said = f"\nMeasured over predicted: {over[0]:.2f} to {over[-1]:.2f}, the median {statistics.median(over):.2f}.\n"
    return text + table((*head, "waiting for rollouts, predicted s", "measured s"), rows) + said


def entropy_terms_cpu(found: Found) -> str:
    def row(name: str) -> list[str]:
        cells = [name]
        for variant in (name, f"head, {name}"):
            own = found["variants"][variant]
            ratios = [ratio["value"] for ratio in found["ratios"] if ratio["of"] == variant]
            cells += [f"{own['cpu_seconds']:.3f}", f"{ratios[0] if ratios else 1:.2f}", f"{own['peak_mib']:.0f}"]
        return cells

    head = ("", *(f"{where}: {what}" for where in ("logits given", "with head") for what in ("CPU s", "ratio", "MiB")))
    return table(head, (row(name) for name in found["variants"] if not name.startswith("head, ")))


def countdown_seeds(found: Found) -> str:
    summary, seeds = found["over_seeds"], found["seeds"]
    head = ["seed", *(f"{label}: {method}" for label in summary for method in ("GRPO", "Lp-Reg"))]
    rows = [
        [seed, *(f"{outcomes[label][method]:.3f}" for label in summary for method in ("grpo", "lp_reg"))]
        for seed, outcomes in seeds.items()
    ]
    rows.append(["mean", *(f"**{each[method]:.3f}**" for each in summary.values() for method in ("grpo", "lp_reg"))])
    rows.append(["before", *(cell for each in summary.values() for cell in (f"{each['before']:.3f}", ""))])
    text = table(head, rows) + "\n"
    for label, each in summary.items():
        value, low, high = (each["difference"][name] for name in ("value", "low", "high"))
        text += (
            f"- {label}: Lp-Reg is higher for {each['higher']} of {each['seeds']} seeds; the mean difference is "
            f"{value:+.3f} (95 % interval over seeds {low:+.3f} to {high:+.3f})"
        )
        clearly = f"; for {each['clearly_higher']} seeds the interval over problems excludes 0"
        text += (clearly if label in ("accuracy", "pass@8") else "") + "\n"
    return text


def environments_learn(found: Found) -> str:
    head = ("run", "agent", "engine", "steps", "seconds", "reward, first 5", "reward, last 5", "fresh, before", "after")
    rows = []
    for name, run in found["runs"].items():
        score = next(iter(run["evaluations"].values()))
        values = (run["first"], run["last"], score["before"], score["after"])
        figures = ("-" if value is None else f"{value:.2f}" for value in values)
        about = (name, run["agent"] or "none", run["engine"], str(run["steps"]), f"{run['seconds']:.0f}")
        rows.append([*about, *figures])
    return table(head, rows)


def agent_learns(found: Found) -> str:
    rows = (
        [
            step,
            *(f"{each[name]:.2f}" for name in ("tool_calls_mean", "turns_mean")),
            *(f"{each[name]:.3f}" for name in ("avg@8", "pass@8", "entropy")),
        ]
        for step, each in found["evaluations"].items()
    )
    reward, last = found["reward of ten steps"], found["last policy"]
    own, without = (
        f"{last[name]['avg@8']['value']:.1%} (95 % interval over problems {last[name]['avg@8']['low']:.1%} to "
        f"{last[name]['avg@8']['high']:.1%})"
        for name in ("with the calculator", "without")
    )
    said = (
        f"The mean reward of ten steps rises from {reward['first']:.2f} to {reward['last']:.2f}. `megatron-rl eval` "
        f"of the last policy gives\n{own} with the calculator. Without it, when the policy writes all\nresults itself, "
        f"{without}.\n"
    )
    return table(("step", "tool calls", "turns", "accuracy", "pass@8", "entropy"), rows) + "\n" + said


def full_size(found: Found) -> str:
    head = ["recipe", "steps", "GiB of a rank, peak", "KV cache of an engine, tokens"]
    head += [f"step, responses of {n}" for n in found["lengths"]]
    head += [f"GPU hours, responses of {n}" for n in found["lengths"]]
    rows = (
        [
            *(f"`{recipe}`", f"{run['steps']:,}", f"{run['peak_gib']:.1f}", f"{run['cache_tokens']:,.0f}"),
            *(f"{seconds / 60:.1f} min" for seconds in run["step_seconds"].values()),
            *(f"{hours:,.0f}" for hours in run["gpu_hours"].values()),
        ]
        for recipe, run in found["runs"].items()
    )
    return table(head, rows)


def evidence(found: Found) -> str:
    from benchmarks.evidence.tables import evidence_tables

    return evidence_tables(found)


TABLES: dict[str, Callable[[Found], str]] = {
    f.__name__: f
    for f in (
        *(batching, training_step, weight_sync, changed_weights, start_up, driver, scaling, grading),
        *(entropy_terms_cpu, countdown_seeds, agent_learns, environments_learn, full_size, evidence),
    )
}
TABLES["evidence_quick"] = evidence


def rendered(name: str) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "(No results are kept yet.)\n"
    found = json.loads(path.read_text())
    return TABLES[name](found) + (where(found) if "machine" in found else "")


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        page.write_text(MARKED.sub(lambda match: f"{match[1]}{rendered(match[2])}{match[3]}", text))
    seeds = RESULTS / "countdown_seeds.json"
    if seeds.exists():
        from benchmarks.lp_reg_pictures import seeds_picture

        seeds_picture(json.loads(seeds.read_text())["seeds"], SEEDS)


if __name__ == "__main__":
    main()
