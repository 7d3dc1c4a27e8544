"""select_lowest and select_highest on one process against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpreg import select_highest, select_lowest

numbers = st.one_of(
    st.floats(allow_nan=False, width=32),
    st.sampled_from([0.0, -0.0, -math.inf, math.inf, -1.0, -1.0000001, 1e-45, -1e-45]),
)


@given(
    st.lists(st.tuples(numbers, st.booleans()), max_size=60),
    st.floats(1e-3, 1.0),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_selection_equals_a_sort(pairs: list[tuple[float, bool]], fraction: float, dtype: torch.dtype) -> None:
    values = torch.tensor([value for value, _ in pairs], dtype=dtype)
    eligible = torch.tensor([chosen for _, chosen in pairs], dtype=torch.bool)
    ranked = sorted(values[eligible].tolist())
    for select, ranking in ((select_lowest, ranked), (select_highest, ranked[::-1])):
        got = select(values, eligible, fraction)
        assert got.population == len(ranked)
        if not ranked:
            assert got.count == 0 and not got.mask.any()
            continue
        threshold = ranking[max(1, int(fraction * len(ranked))) - 1]
        beyond = (values <= threshold) if select is select_lowest else (values >= threshold)
        assert got.threshold == threshold
        assert torch.equal(got.mask, eligible & beyond)
        assert got.count == int(got.mask.sum()) >= 1


def test_ties_are_all_chosen_and_signed_zeros_tie() -> None:
    got = select_lowest(torch.tensor([0.0, -0.0, 1.0, -0.0]), torch.ones(4, dtype=torch.bool), 0.25)
    assert got.threshold == 0 and got.mask.tolist() == [True, True, False, True] and got.count == 3


def test_fp64_values_are_ranked_beyond_fp32() -> None:
    values = torch.tensor([1 + 1e-12, 1.0, 1 + 2e-12, 1 - 1e-12], dtype=torch.float64)
    assert select_lowest(values, torch.ones(4, dtype=torch.bool), 0.5).mask.tolist() == [False, True, False, True]


def test_bf16_values_are_ranked_as_they_are() -> None:
    values = torch.tensor([-3.0, 2.0, -1.0, 0.5], dtype=torch.bfloat16)
    got = select_lowest(values, torch.ones(4, dtype=torch.bool), 0.5)
    assert got.threshold == -1.0 and got.mask.tolist() == [True, False, True, False]


def test_any_shape_and_values_with_a_gradient() -> None:
    values = torch.tensor([[3.0, 1.0], [2.0, 4.0]], requires_grad=True)
    got = select_highest(values, torch.ones(2, 2, dtype=torch.bool), 0.5)
    assert got.mask.tolist() == [[True, False], [False, True]] and got.threshold == 3.0


def test_nan_is_refused_only_among_the_eligible() -> None:
    values = torch.tensor([1.0, math.nan, 2.0, math.nan])
    with pytest.raises(ValueError, match=r"2 eligible tokens are NaN, the first on this rank at \[1, 3\]"):
        select_lowest(values, torch.ones(4, dtype=torch.bool), 0.5)
    assert select_lowest(values, ~values.isnan(), 0.5).mask.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.01}, "fraction"),
        ({"fraction": math.nan}, "fraction"),
        ({"values": torch.arange(4)}, "values must be floating point"),
        ({"eligible": torch.ones(4)}, "eligible must be bool"),
        ({"eligible": torch.ones(3, dtype=torch.bool)}, r"eligible must be bool of shape \[4\]"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"values": torch.zeros(4), "eligible": torch.ones(4, dtype=torch.bool), "fraction": 0.5} | change
    with pytest.raises(ValueError, match=message):
        select_lowest(**arguments)


def test_the_count_is_that_of_the_decimal_number() -> None:
    """In floats .29 * 100 is 28.999999999999996."""
    values = torch.arange(100.0)
    for fraction, count in ((0.29, 29), (0.07, 7), (0.57, 57), (1e-9, 1), (1.0, 100), (0.999, 99)):
        assert select_lowest(values, values >= 0, fraction).count == count
