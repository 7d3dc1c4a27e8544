"""avg@k, pass@k, maj@k and their intervals, against their definitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.evaluation.measures import Measures, estimate, macro, majority_is_right, pass_at_k
from tests.unit.evaluation.conftest import problem, response


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(samples: int) -> None:
    for right in range(samples + 1):
        for k in range(1, samples + 1):
            subsets = list(combinations([i < right for i in range(samples)], k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_needs_at_least_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples, there are 2"):
        pass_at_k(2, 1, 3)


def test_measures_are_means_over_problems() -> None:
    measures = Measures(
        [
            problem(*(response(score, tokens=2) for score in (1, 0, 0, 0))),
            problem(*(response(0, tokens=4, truncated=True) for _ in range(4))),
            problem(*(response(1, tokens=6) for _ in range(4))),
        ]
    )
    assert measures.metrics() == pytest.approx(
        {
            "avg@4": (0.25 + 0 + 1) / 3,
            "pass@4": 2 / 3,
            "maj@4": 2 / 3,
            "response_length": 4,
            "truncated_fraction": 1 / 3,
        }
    )
    assert measures.pass_at(2).value == pytest.approx((0.5 + 0 + 1) / 3)


def test_one_response_has_no_majority() -> None:
    assert set(Measures([problem(response(1))]).metrics()) == {
        "avg@1",
        "pass@1",
        "response_length",
        "truncated_fraction",
    }


@pytest.mark.parametrize(
    ("responses", "right"),
    [
        ([(1, "1/2"), (1, "0.5"), (0, "3"), (0, "4")], 1.0),
        ([(1, "2"), (0, "3"), (0, " 3 ")], 0.0),
        ([(1, "2"), (0, "3")], 0.5),
        ([(1, "2"), (0, "3"), (0, "4")], 1 / 3),
        ([(1, "2"), (0, None), (0, None)], 1.0),
        ([(0, None), (0, None)], 0.0),
        ([(1, None), (0, "3")], 0.5),
    ],
)
def test_the_majority_with_ties_and_missing_answers(responses: list[tuple[float, str | None]], right: float) -> None:
    assert majority_is_right(problem(*(response(*pair) for pair in responses))) == pytest.approx(right)


def test_the_interval_is_that_of_the_bootstrap() -> None:
    """For P Bernoulli problems the resampled mean is binomial, which has exact quantiles."""
    values = np.array([1.0] * 30 + [0.0] * 70)
    found = estimate([values])
    exact = np.quantile(np.random.default_rng(1).binomial(100, 0.3, size=400_000) / 100, [0.025, 0.975])
    assert found.value == 0.3
    assert [found.low, found.high] == pytest.approx(exact, abs=0.011)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_an_interval_contains_its_value(values: list[float]) -> None:
    found = estimate([np.array(values)])
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert estimate([np.array(values)]) == found, "the same random numbers every time"


def test_the_macro_mean_gives_suites_equal_weight() -> None:
    large = Measures([problem(response(1)) for _ in range(90)])
    small = Measures([problem(response(0)) for _ in range(10)])
    assert macro([large, small]).value == 0.5
    mixed = Measures([problem(response(i % 2)) for i in range(10)])
    both, one = macro([large, mixed]), mixed.avg
    assert both.high - both.low == pytest.approx((one.high - one.low) / 2)
