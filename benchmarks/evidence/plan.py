"""Which runs the evidence consists of: arms, warm starts, seeds, and the tuning that each arm gets first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import ARMS

HERE = Path(__file__).parent
TUNING_SEED = 100
"""The seed of the tuning runs, which no result is from."""
MAIN = ("grpo", "entropy_bonus", "high_entropy", "lp_reg-k3", "lp_reg-full", "lp_reg-lagged")
"""The arms that a plan may also train for many steps."""


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    warm_start: int
    """The seed of the task: its problems, traces and untrained model."""
    seed: int
    steps: int
    """On-policy steps; an off-policy run samples as many responses."""
    samples: int
    """Responses per problem of the fresh split."""
    settings: tuple[str, ...]
    """The arm's overrides."""

    @property
    def name(self) -> str:
        """The name of its folder, different for different settings."""
        content = repr((self.steps, self.samples, self.settings))
        return f"{self.arm}-w{self.warm_start}-s{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"

    @property
    def config(self) -> Path:
        return HERE / ("off_policy.yaml" if ARMS[self.arm].kind == "off-policy" else "on_policy.yaml")

    @property
    def overrides(self) -> list[str]:
        """Everything but the task."""
        steps = -(-self.steps // 4) if ARMS[self.arm].kind == "off-policy" else self.steps
        return [*self.settings, f"train.steps={steps}", f"seed={self.seed}"]


Chosen = Mapping[str, object]
"""The tuned value of each arm."""


def settings_of(arm: str, chosen: Chosen) -> tuple[str, ...]:
    """Returns the overrides of an arm with its tuned value, or that of the arm that it follows."""
    found = ARMS[arm]
    settings = dict(found.settings)
    if found.tuned is not None:
        settings[found.tuned[0]] = chosen.get(arm, found.tuned[1][0])
    if found.follows is not None:
        other, key, factor = found.follows
        tuned = ARMS[other].tuned
        assert tuned is not None
        settings[key] = min(1.0, factor * float(str(chosen.get(other, tuned[1][0]))))
    return tuple(f"{key}={value}" for key, value in settings.items())


@dataclass(frozen=True)
class Plan:
    """The runs of one command, in an order in which an interrupted one has compared all arms equally often."""

    arms: Sequence[str]
    warm_starts: Sequence[int]
    seeds: Sequence[int]
    steps: int
    samples: int
    tuned: bool = False
    """Whether every arm's tuned setting is chosen first, by runs of the same length with another seed."""
    long_steps: int = 0
    """Steps of a further run of each main arm with the first warm start; 0: none."""
    long_seeds: Sequence[int] = field(default=(0,))

    def tuning(self) -> Iterator[tuple[str, object, Run]]:
        """Yields (arm, value, run)."""
        for arm in self.arms if self.tuned else ():
            for value in (ARMS[arm].tuned or ("", ()))[1]:
                yield arm, value, self._run(arm, self.warm_starts[0], TUNING_SEED, self.steps, {arm: value})

    def chosen(self, results: Mapping[str, Mapping[str, Any]]) -> Chosen | None:
        """Returns each arm's value with the highest mean of accuracy and pass@8 on the tuning split. None: some tuning
        run has no result yet. results: by the name of the run."""
        scores: dict[str, dict[object, float]] = {}
        for arm, value, run in self.tuning():
            if run.name not in results:
                return None
            scores.setdefault(arm, {})[value] = results[run.name]["after"]["tuning"]
        return {arm: max(values, key=values.__getitem__) for arm, values in scores.items()}

    def compared(self, chosen: Chosen) -> Iterator[Run]:
        """Yields the runs that are compared."""
        for seed in self.seeds:
            for warm_start in self.warm_starts:
                for arm in self.arms:
                    yield self._run(arm, warm_start, seed, self.steps, chosen)

    def long(self, chosen: Chosen) -> Iterator[Run]:
        for seed in self.long_seeds if self.long_steps else ():
            for arm in MAIN:
                yield self._run(arm, self.warm_starts[0], seed, self.long_steps, chosen)

    def _run(self, arm: str, warm_start: int, seed: int, steps: int, chosen: Chosen) -> Run:
        return Run(arm, warm_start, seed, steps, self.samples, settings_of(arm, chosen))


PLANS = {
    "quick": Plan(
        ("grpo", "entropy_bonus", "lp_reg-k3", "lp_reg-lagged", "all", "random", "half_push"), (0,), range(5), 100, 16
    ),
    "full": Plan(tuple(ARMS), (0, 1), range(5), 150, 64, tuned=True, long_steps=1000),
}
