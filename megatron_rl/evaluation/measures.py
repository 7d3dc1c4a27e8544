"""Measures of a model from its graded responses: avg@k, pass@k and maj@k with intervals.

A response that could not be graded is neither right nor wrong: it has no part in any of them, and neither has a problem
without any graded response. Legend: P problems with graded responses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np
from numpy.typing import NDArray

from megatron_rl.evaluation.problems import Problem

Array = NDArray[np.float64]
RESAMPLES = 10_000
AT_ONCE = 1_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, with a bootstrap interval of level `CONFIDENCE` for other problems of the same kind. All
    three are NaN without problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measures:
    """Measures of one suite."""

    problems: Sequence[Problem]

    @cached_property
    def k(self) -> int:
        """Number of responses per problem."""
        return len(self.problems[0].responses)

    @cached_property
    def avg(self) -> Estimate:
        """avg@k: the mean score."""
        return estimate([self.mean_scores])

    @cached_property
    def mean_scores(self) -> Array:
        """[P], mean score of each problem's graded responses."""
        return np.array([problem.mean_score for problem in self._graded], dtype=np.float64)

    def pass_at(self, k: int) -> Estimate:
        """pass@k: the chance that at least one of k responses is right; of all graded ones, if these are fewer."""
        counts = ((len(problem.graded), problem.right) for problem in self._graded)
        return estimate([np.array([pass_at_k(count, right, min(k, count)) for count, right in counts])])

    @cached_property
    def majority(self) -> Estimate:
        """maj@k: share of problems whose most frequent answer is right."""
        return estimate([np.array([majority_is_right(problem) for problem in self._graded])])

    @cached_property
    def _graded(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.graded]

    @property
    def response_length(self) -> float:
        """Mean number of tokens per response."""
        return self._mean(response.tokens for problem in self.problems for response in problem.responses)

    @property
    def truncated_fraction(self) -> float:
        return self._mean(response.truncated for problem in self.problems for response in problem.responses)

    @property
    def failed_fraction(self) -> float:
        """Share of responses whose generation or grading failed, or whose grading timed out."""
        return self._mean(not response.has_score for problem in self.problems for response in problem.responses)

    def metrics(self) -> dict[str, float]:
        """Metrics under the names that a run logs, without the prefix `eval/<suite>/`; accuracies only if some response
        was graded, and the share that was not only if there is one."""
        found: dict[str, float] = {}
        if self._graded:
            found = {f"avg@{self.k}": self.avg.value, f"pass@{self.k}": self.pass_at(self.k).value}
            if self.k > 1:
                found[f"maj@{self.k}"] = self.majority.value
        if self.failed_fraction:
            found["failed_fraction"] = self.failed_fraction
        return found | {"response_length": self.response_length, "truncated_fraction": self.truncated_fraction}

    @staticmethod
    def _mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Returns the chance that at least one of k responses drawn from `samples` is right (unbiased; Chen et al. 2021).

    Raises ValueError if there are fewer than k samples.
    """
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority_is_right(problem: Problem) -> float:
    """Returns 1 if the most frequent answer is right, else 0; a fraction if several answers are equally frequent.

    A response without an answer has no vote, and neither has one that could not be graded. All right answers count as
    the same answer, however they are written; wrong answers are distinguished by their text.
    """
    votes: dict[str | None, int] = defaultdict(int)  # None stands for the right answer
    for response in problem.graded:
        if response.right:
            votes[None] += 1
        elif response.answer is not None:
            votes["".join(response.answer.split())] += 1
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return (None in winners) / len(winners) if winners else 0.0


def macro(suites: Sequence[Measures]) -> Estimate:
    """Returns the unweighted mean of the suites' avg@k, without suites of which nothing was graded."""
    return estimate([suite.mean_scores for suite in suites if len(suite.mean_scores)])


def estimate(values: Sequence[Array]) -> Estimate:
    """Returns the mean of the means of the suites' values, each [P_i], with its bootstrap interval.

    The problems of each suite are redrawn with replacement `RESAMPLES` times, always with the same random numbers.
    """
    if not sum(map(len, values)):
        return Estimate(math.nan, math.nan, math.nan)
    random = np.random.default_rng(0)
    means = np.mean([_resampled_means(suite, random) for suite in values], axis=0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(np.mean([suite.mean() for suite in values])), float(low), float(high))


def _resampled_means(values: Array, random: np.random.Generator) -> Array:
    """Returns the means [RESAMPLES] of resampled values. The number of times each problem is drawn is multinomial."""
    size, parts = len(values), []
    for start in range(0, RESAMPLES, AT_ONCE):
        draws = min(AT_ONCE, RESAMPLES - start)
        parts.append(random.multinomial(size, np.full(size, 1 / size), size=draws) @ values / size)
    means: Array = np.concatenate(parts)
    return means
