"""What the evidence is to decide: each claim as a difference of two arms, or of one arm and the warm start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.statistics import Mean

ENOUGH = 5
"""Pairs that a verdict needs."""

Outcomes = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """One claim. It is shown if the interval of the difference lies on the side that it names."""

    source: str
    """paper, README, or question: nobody claims it, but the method's explanation depends on it."""
    text: str
    arm: str
    against: str | None
    """Another arm, paired by warm start and seed. None: the same run before training."""
    measure: str
    higher: bool = True

    def differences(self, runs: Outcomes) -> list[float]:
        """Returns the paired differences of the measure after training."""
        if self.against is None:
            return [run["after"][self.measure] - run["before"][self.measure] for run in runs if run["arm"] == self.arm]
        return paired(runs, self.arm, self.against, self.measure)

    def verdict(self, differences: Sequence[float]) -> str:
        if len(differences) < ENOUGH:
            return f"not shown ({len(differences)} of {ENOUGH} pairs)"
        mean = Mean.of(differences)
        if mean.low <= 0 <= mean.high:
            return "not shown"
        return "**shown**" if (mean.value > 0) == self.higher else "**contradicted**"


def paired(runs: Outcomes, arm: str, against: str, measure: str) -> list[float]:
    """Returns arm - against for every warm start and seed that both have."""
    values = {(run["arm"], run["warm_start"], run["seed"]): run["after"][measure] for run in runs}
    places = [place for name, *place in values if name == arm and (against, *place) in values]
    return [values[arm, *place] - values[against, *place] for place in places]


CLAIMS = (
    Claim("paper", "GRPO loses entropy", "grpo", None, "entropy", higher=False),
    Claim("paper", "GRPO loses the spark `wait`", "grpo", None, "spark", higher=False),
    Claim("paper", "GRPO loses diversity: pass@8 falls", "grpo", None, "pass@8", higher=False),
    Claim("paper", "Literal Lp-Reg (k3) ends with more entropy than GRPO", "lp_reg-k3", "grpo", "entropy"),
    Claim("paper", "Literal Lp-Reg (k3) keeps the spark likelier than GRPO", "lp_reg-k3", "grpo", "spark"),
    Claim("paper", "Literal Lp-Reg (k3) is more accurate than GRPO", "lp_reg-k3", "grpo", "accuracy"),
    Claim("paper", "Literal Lp-Reg (full KL) is more accurate than GRPO", "lp_reg-full", "grpo", "accuracy"),
    Claim("paper", "An entropy bonus makes noise words likelier than GRPO", "entropy_bonus", "grpo", "noise"),
    Claim(
        "paper",
        "Lp-Reg has rarer noise words than an entropy bonus",
        "lp_reg-lagged",
        "entropy_bonus",
        "noise",
        False,
    ),
    Claim("paper", "Off-policy Lp-Reg is more accurate than GRPO", "lp_reg-off", "grpo-off", "accuracy"),
    Claim("paper", "Long tail: literal Lp-Reg (k3) has a likelier spark", "lp_reg-k3-tail", "grpo-tail", "spark"),
    Claim("paper", "Long tail: literal Lp-Reg (k3) is more accurate", "lp_reg-k3-tail", "grpo-tail", "accuracy"),
    Claim("paper", "Long tail: literal Lp-Reg (full KL) is more accurate", "lp_reg-full-tail", "grpo-tail", "accuracy"),
    Claim("paper", "Long tail: an entropy bonus has more noise", "entropy_bonus-tail", "grpo-tail", "noise"),
    Claim(
        "paper",
        "Long tail: it has more noise than Lp-Reg",
        "entropy_bonus-tail",
        "lp_reg-k3-tail",
        "noise",
    ),
    Claim("question", "Long tail: rare tokens matter: spark, against all", "lp_reg-k3-tail", "all-tail", "spark"),
    Claim("question", "Long tail: rare tokens matter: spark, against random", "lp_reg-k3-tail", "random-tail", "spark"),
    Claim("README", "Lagged Lp-Reg has a higher pass@8 than GRPO", "lp_reg-lagged", "grpo", "pass@8"),
    Claim("README", "Lagged Lp-Reg ends with more entropy than GRPO", "lp_reg-lagged", "grpo", "entropy"),
    Claim("README", "Lagged Lp-Reg makes the spark likelier than GRPO", "lp_reg-lagged", "grpo", "spark"),
    Claim("question", "Lagged Lp-Reg is more accurate than GRPO", "lp_reg-lagged", "grpo", "accuracy"),
    Claim(
        "question",
        "Lagged Lp-Reg has a higher pass@8 than an entropy bonus",
        "lp_reg-lagged",
        "entropy_bonus",
        "pass@8",
    ),
    Claim("question", "Rare tokens matter: pass@8 above that of all negatives", "lp_reg-lagged", "all", "pass@8"),
    Claim("question", "Rare tokens matter: spark above that of all negatives", "lp_reg-lagged", "all", "spark"),
    Claim("question", "Rare tokens matter: pass@8 above that of random tokens", "lp_reg-lagged", "random", "pass@8"),
    Claim("question", "The proxy matters: pass@8 above that of half push", "lp_reg-lagged", "half_push", "pass@8"),
    Claim("question", "Lp-Reg adds to DPPO: pass@8", "dppo-lp_reg-off", "dppo-off", "pass@8"),
)
