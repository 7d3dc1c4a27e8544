from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.actor.optimizer.learning_rate import learning_rate

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def rates(schedule: Schedule, steps: list[int], *, warmup_steps: int = 4, min_ratio: float = 0.1) -> list[float]:
    return [
        learning_rate(step, peak=2.0, total_steps=12, warmup_steps=warmup_steps, schedule=schedule, min_ratio=min_ratio)
        for step in steps
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: Schedule) -> None:
    assert rates(schedule, [1, 2, 3, 4]) == pytest.approx([0.5, 1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2.0, 2.0, 2.0]),
        ("linear", [2 - 1.8 / 8, 1.1, 0.2]),
        ("cosine", [0.2 + 0.9 * (1 + math.cos(math.pi / 8)), 1.1, 0.2]),
    ],
)
def test_rates_after_warm_up_at_half_way_and_at_the_end(schedule: Schedule, expected: list[float]) -> None:
    assert rates(schedule, [5, 8, 12]) == pytest.approx(expected)


def test_the_default_schedule_is_constant_at_the_peak() -> None:
    assert [learning_rate(step, peak=3e-4, total_steps=5) for step in range(1, 6)] == [3e-4] * 5


def test_a_single_step_uses_the_final_rate() -> None:
    assert learning_rate(1, peak=1.0, total_steps=1, schedule="cosine", min_ratio=0.5) == pytest.approx(0.5)


@given(
    st.sampled_from(SCHEDULES),
    st.floats(1e-8, 10),
    st.floats(0, 1),
    st.integers(0, 60),
    st.integers(1, 60).flatmap(lambda total: st.tuples(st.just(total), st.integers(1, total))),
)
def test_rates_rise_during_warm_up_and_never_rise_after_it(
    schedule: Schedule, peak: float, min_ratio: float, warmup: int, steps: tuple[int, int]
) -> None:
    total, step = steps
    rate, following = (
        learning_rate(at, peak=peak, total_steps=total, warmup_steps=warmup, schedule=schedule, min_ratio=min_ratio)
        for at in (step, min(step + 1, total))
    )
    slack = 1e-12 * peak
    if step > warmup:
        assert min_ratio * peak - slack <= rate <= peak + slack
        assert following <= rate + slack
    else:
        assert 0 < rate <= peak + slack
