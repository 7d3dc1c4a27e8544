"""avg@k, pass@k, maj@k and their intervals, against their definitions."""

from __future__ import annotations

import io
import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_rl.evaluation.evaluate import summary_of
from megatron_rl.evaluation.measures import Measures, estimate, macro, majority_is_right, pass_at_k
from megatron_rl.evaluation.problems import GradedResponse
from megatron_rl.evaluation.table import table_of
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


def late(score: float = 1.0, answer: str | None = "3") -> GradedResponse:
    return response(score, answer, tokens=3, outcome="timeout")


def test_failures_are_neither_right_nor_wrong() -> None:
    graded = [[response(1), response(0, "3"), response(0, "4")], [response(0, "3")], [response(1), response(1)]]
    failed = [[late()], [late(), late(), late(0.0)], [late(0.0), late()]]
    found = Measures([problem(*one, *other) for one, other in zip(graded, failed, strict=True)])
    assert found.k == 4 and found.failed_fraction == 0.5
    assert found.metrics() == pytest.approx(
        {
            "avg@4": (1 / 3 + 0 + 1) / 3,
            "pass@4": 2 / 3,
            "maj@4": (1 / 3 + 0 + 1) / 3,
            "failed_fraction": 0.5,
            "response_length": 3,
            "truncated_fraction": 0.0,
        }
    )
    assert found.pass_at(1).value == pytest.approx(found.avg.value)
    assert found.pass_at(2).value == pytest.approx((2 / 3 + 0 + 1) / 3)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_measures_are_those_of_the_graded_responses(problems: list[list[bool]], data: st.DataObject) -> None:
    """With the same number of graded responses per problem, the measures are those of a suite that has only these."""
    size = min(map(len, problems))
    clean = [problem(*(response(right, str(i)) for i, right in enumerate(one[:size]))) for one in problems]
    mixed = []
    for one in clean:
        responses = list(one.responses)
        responses.insert(data.draw(st.integers(0, size)), late(data.draw(st.sampled_from([0.0, 1.0]))))
        mixed.append(problem(*responses))
    mixed.append(problem(*[late()] * (size + 1)))
    found, want = Measures(mixed), Measures(clean)
    assert found.avg == want.avg and found.majority == want.majority
    for k in range(1, size + 1):
        assert found.pass_at(k) == want.pass_at(k)
    assert found.pass_at(size + 1) == want.pass_at(size), "pass@k of the graded responses, if there are fewer than k"
    assert macro([found, Measures([problem(late())])]) == macro([want])


@pytest.mark.filterwarnings("error")
def test_a_suite_of_which_nothing_was_graded_has_no_accuracy() -> None:
    found = Measures([problem(late(), late()), problem(late(), late())])
    assert found.metrics() == {"failed_fraction": 1.0, "response_length": 3, "truncated_fraction": 0}
    assert all(np.isnan(value) for value in (found.avg.value, found.pass_at(2).low, found.majority.high))
    summary = json.loads(json.dumps(summary_of({"a": found}), allow_nan=False))
    assert summary["suites"]["a"]["avg@2"] is None and summary["macro_mean"] is None
    assert summary["suites"]["a"]["failed_fraction"] == 1.0
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table_of({"a": found}, "a title"))
    assert "nothing graded" in console.export_text() and "nan" not in console.export_text()


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
