"""The tables of docs/evidence.md, from kept results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.claims import CLAIMS, Outcomes, paired
from benchmarks.evidence.plan import PLANS, Run
from benchmarks.evidence.statistics import Mean, sign_flip_p

MEASURES = ("accuracy", "pass@8", "entropy", "length", "spark", "noise")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *rows))


def results_of(runs: Iterable[Run], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the outcomes of those of the runs that have one."""
    return [found["runs"][run.name] for run in runs if run.name in found["runs"]]


def bounds(mean: Mean, signed: str = "") -> str:
    """The mean, with its interval from three values on: that of two is wider than any measure."""
    if mean.count < 3:
        return f"{mean.value:{signed}.3f}"
    return f"{mean.value:{signed}.3f} ({mean.low:{signed}.3f} to {mean.high:{signed}.3f})"


def arms_table(runs: Outcomes) -> str:
    """Every arm: its means after training, the share of tokens with its KL, and the differences to its GRPO."""
    rows = []
    for name, arm in ARMS.items():
        own = [run for run in runs if run["arm"] == name]
        if not own:
            continue
        cells = [arm.title, str(len(own))]
        cells += [bounds(Mean.of([run["after"][measure] for run in own])) for measure in MEASURES[:3]]
        cells += [f"{Mean.of([run['after'][measure] for run in own]).value:.3f}" for measure in MEASURES[3:]]
        shares = [run["regularised"] for run in own if run["regularised"] is not None]
        cells.append(f"{Mean.of(shares).value:.2%}" if shares else "")
        for measure in ("accuracy", "pass@8"):
            differences = [] if name == arm.baseline else paired(runs, name, arm.baseline, measure)
            p = f", p {sign_flip_p(differences):.3f}" if len(differences) > 1 else ""
            cells.append(bounds(Mean.of(differences), "+") + p if differences else "")
        rows.append(cells)
    before = [f"{Mean.of([run['before'][measure] for run in runs]).value:.3f}" for measure in MEASURES]
    rows.append(["before training", "", *before, "", "", ""])
    head = ["arm", "runs", *MEASURES, "tokens with the KL", "accuracy - GRPO", "pass@8 - GRPO"]
    return markdown(head, rows)


def pass_table(runs: Outcomes) -> str:
    """pass@k of every arm."""
    ks = [key for key in runs[0]["after"] if key.startswith("pass@")]
    groups = {"before training": [run["before"] for run in runs]}
    groups |= {arm.title: [run["after"] for run in runs if run["arm"] == name] for name, arm in ARMS.items()}
    rows = [
        [label, *(f"{Mean.of([each[k] for each in values]).value:.3f}" for k in ks)]
        for label, values in groups.items()
        if values
    ]
    return markdown(["arm", *ks], rows)


def claims_table(runs: Outcomes) -> str:
    """Every claim whose arms have runs, with its verdict; the number of the others."""
    rows, missing = [], 0
    for claim in CLAIMS:
        differences = claim.differences(runs)
        if not differences:
            missing += 1
            continue
        p = f"{sign_flip_p(differences):.3f}"
        numbers = [bounds(Mean.of(differences), "+"), str(len(differences)), p]
        rows.append([claim.source, claim.text, *numbers, claim.verdict(differences)])
    said = f"\n{missing} further claims have no runs yet.\n" if missing else ""
    return markdown(["from", "claim", "difference (95 % interval)", "pairs", "p", "verdict"], rows) + said


def evidence_tables(found: Mapping[str, Any]) -> str:
    """Everything that one plan's results say."""
    plan = PLANS[found["plan"]]
    chosen = plan.chosen(found["runs"])
    runs = [] if chosen is None else results_of(plan.compared(chosen), found)
    if chosen is None or not runs:
        return "(No run that is compared has ended yet.)\n"
    planned = len(plan.arms) * len(plan.warm_starts) * len(plan.seeds)
    said = (
        f"{len(runs)} of {planned} planned runs of {plan.steps} steps, {plan.samples} samples per problem; "
        f"tuning: {'three values per arm' if plan.tuned else 'none'}.\n\n"
    )
    parts = [said, claims_table(runs), "\n", arms_table(runs), "\n", pass_table(runs)]
    if long := results_of(plan.long(chosen), found):
        parts += [f"\nAfter {plan.long_steps} steps:\n\n", arms_table(long)]
    return "".join(parts)
