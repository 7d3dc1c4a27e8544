"""95 % intervals of accuracy and pass@k over problems, from the graded problems that a run keeps.

An interval is that of other problems of the same kind, by the normal approximation: 1.96 standard errors of the mean
over problems. Differences are paired: both sides are about the same problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev

from megatron_rl.utils.bounded import read_parquet

from .run_data import RunData

FACTOR = 1.96
PerProblem = Mapping[str, float]
"""Value of one measure by problem id."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of means, and the half-width of its interval."""

    value: float
    half_width: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.value) > self.half_width


def per_problem(run: RunData, suite: str, metric: str, step: int) -> PerProblem | None:
    """Returns each problem's value of `avg@k` or `pass@k`; None for another metric or without a record of it."""
    path = run.folder / "evaluations" / f"step_{step:06d}" / f"{suite}.parquet"
    if not metric.startswith(("avg@", "pass@")) or not path.is_file():
        return None
    return _read(path, path.stat().st_mtime_ns)[0 if metric.startswith("avg@") else 1]


@lru_cache(maxsize=512)
def _read(path: Path, _changed: int) -> tuple[PerProblem, PerProblem]:
    table = read_parquet(path, columns=["id", "mean_score", "right"]).to_pydict()
    solved = [float(right > 0) for right in table["right"]]
    return dict(zip(table["id"], table["mean_score"], strict=True)), dict(zip(table["id"], solved, strict=True))


def half_width(run: RunData, suite: str, metric: str, step: int) -> float | None:
    """Returns the half-width of the interval of a metric at a step; None if it is not known."""
    values = per_problem(run, suite, metric, step)
    return None if values is None or len(values) < 2 else FACTOR * _standard_error(list(values.values()))


def difference(above: Sequence[PerProblem | None], below: Sequence[PerProblem | None]) -> Difference | None:
    """Returns the paired difference of two groups of seeds: mean of `above` less mean of `below`.

    With several seeds on both sides, the spread of their means widens the interval. None without values, or if fewer
    than two problems are common to all.
    """
    known_above, known_below = [v for v in above if v is not None], [v for v in below if v is not None]
    if not known_above or not known_below:
        return None
    common = sorted(set.intersection(*(set(values) for values in (*known_above, *known_below))))
    if len(common) < 2:
        return None
    pairs = [fmean(v[name] for v in known_above) - fmean(v[name] for v in known_below) for name in common]
    variance = _standard_error(pairs) ** 2
    if len(known_above) > 1 and len(known_below) > 1:
        for side in (known_above, known_below):
            variance += _standard_error([fmean(values[name] for name in common) for values in side]) ** 2
    return Difference(fmean(pairs), FACTOR * variance**0.5)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5
