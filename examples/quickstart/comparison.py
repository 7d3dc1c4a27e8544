"""Compares the two runs of the demonstration on problems that no choice depended on.

Every difference is paired by problem. Its interval covers the choice of problems, not the choice of the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_rl.evaluation.measures import Estimate, Measures, estimate, pass_at_k
from megatron_rl.evaluation.problems import Problem, read_problems
from megatron_rl.observability.metrics import read_metrics, series
from megatron_rl.utils.format import number

METHODS = {"grpo": "GRPO", "lp_reg": "Lp-Reg"}
"""The method of each run, and its label."""
SUITE = "fresh"
ACCURACY, PASS = "accuracy", "pass@8"
WAIT = "the probability of `wait` after a failed attempt"
MEASURED = {ACCURACY: "avg@8", PASS: "pass@8", "entropy": "entropy", "p(wait after no)": "p_wait_after_no"}
"""Label and metric of each measure. The last is the probability of the rare word."""


@dataclass(frozen=True)
class Outcome:
    """One measure on the fresh problems, before training and after it with each method."""

    label: str
    before: float
    grpo: float
    lp_reg: float
    difference: Estimate | None
    """Lp-Reg minus GRPO; None if the measure has no value per problem."""

    @property
    def verdict(self) -> str:
        """Where Lp-Reg stands: ahead, behind, or level if the interval of the difference contains 0."""
        assert self.difference
        return "ahead" if self.difference.low > 0 else "behind" if self.difference.high < 0 else "level"


def outcomes(folders: Mapping[str, Path]) -> list[Outcome]:
    """Returns every measure of `MEASURED`. `folders`: method -> folder of its finished run."""
    rows = {method: read_metrics(folders[method]) for method in METHODS}
    problems = {method: last_problems(folders[method]) for method in METHODS}
    found = []
    for label, metric in MEASURED.items():
        values = {method: series(rows[method], f"eval/{SUITE}/{metric}")[1] for method in METHODS}
        grpo, lp_reg = (per_problem(label, problems[method]) for method in METHODS)
        difference = None if grpo is None or lp_reg is None else estimate([lp_reg - grpo])
        found.append(Outcome(label, values["grpo"][0], values["grpo"][-1], values["lp_reg"][-1], difference))
    return found


def last_problems(folder: Path) -> list[Problem]:
    """Returns the fresh problems with the responses of the run's last evaluation, ordered by their ids."""
    newest = max((folder / "evaluations").glob(f"step_*/{SUITE}.parquet"))
    return sorted(read_problems(newest), key=lambda problem: problem.id)


def per_problem(label: str, problems: Sequence[Problem]) -> np.ndarray | None:
    """Returns the measure of each problem, [P], or None if it has no value per problem."""
    if label == ACCURACY:
        return Measures(problems).mean_scores
    if label == PASS:
        return np.array([pass_at_k(len(p.responses), p.right, 8) for p in problems])
    return None


def table(found: Sequence[Outcome]) -> Table:
    """Returns the outcomes as a table for the terminal."""
    result = Table(title="On the fresh problems", title_justify="left", title_style="bold")
    result.add_column("measure", no_wrap=True)
    for name in ("before", *METHODS.values(), "difference", "95 % interval"):
        result.add_column(name, justify="right", no_wrap=True)
    for each in found:
        cells = [each.label, number(each.before), number(each.grpo), number(each.lp_reg)]
        if each.difference:
            interval = f"{each.difference.low:+.3f} to {each.difference.high:+.3f}"
            result.add_row(*cells, f"{each.difference.value:+.3f}", interval)
        else:
            result.add_row(*cells, f"{each.lp_reg - each.grpo:+.3f}", "")
    return result


def conclusion(found: Sequence[Outcome], problems: int) -> str:
    """Returns what the numbers say, in words: what Lp-Reg improved over GRPO, what not, by how much, how certainly."""
    tested = [each for each in found if each.difference]
    parts = [_stands(each) for verdict in ("ahead", "level", "behind") for each in tested if each.verdict == verdict]
    wait, passed = found[-1], next(each for each in found if each.label == PASS)
    return (
        f"On {problems} fresh problems, {'; '.join(parts)}. "
        f"{_against_before(PASS, passed)} {_against_before(WAIT, wait)} "
        "The intervals are for other problems of the same kind; another seed can differ by more: docs/demonstration.md."
    )


def _stands(each: Outcome) -> str:
    difference = each.difference
    assert difference
    values = (
        f"{each.lp_reg:.3f} against {each.grpo:.3f}, a difference of {difference.value:+.3f} with a 95 % interval of "
        f"{difference.low:+.3f} to {difference.high:+.3f}"
    )
    stands = {
        "ahead": "Lp-Reg is ahead of GRPO",
        "level": "there is no clear difference",
        "behind": "Lp-Reg is behind GRPO",
    }
    return f"{stands[each.verdict]} in {each.label} ({values})"


def _against_before(what: str, each: Outcome) -> str:
    grpo, lp_reg = (_moved(each.before, after) for after in (each.grpo, each.lp_reg))
    return f"From {each.before:.3f} before training, {what} {grpo} with GRPO and {lp_reg} with Lp-Reg."


def _moved(before: float, after: float) -> str:
    if f"{after:.3f}" == f"{before:.3f}":
        return "did not move"
    return f"{'rose' if after > before else 'fell'} to {after:.3f}"
