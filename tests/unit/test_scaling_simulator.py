"""The simulated clock of `benchmarks/scaling.py`, in cases small enough to compute the time of a step by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scaling_check import MODES, QUICKSTART
from benchmarks.scaling_simulator import Fleet, LengthsOf, Rates, simulate
from megatron_rl.config import Config, load_config

ONE_SECOND_PER_TOKEN = Rates(decode=lambda rows, before: 1.0, read=lambda prefixes: 0.0, prompt=1.0)
"""One second per token, for any number of responses."""


def config_of(mode: str, groups: int) -> Config:
    return load_config(QUICKSTART, [*MODES[mode], f"rollout.prompts_per_step={groups}"])


def in_turn(*lengths: int) -> LengthsOf:
    """Returns the lengths of prompts with one response each, in order."""
    return lambda row: np.array([lengths[row]])


def always(length: int) -> LengthsOf:
    return lambda row: np.array([length])


@pytest.mark.parametrize("embedded", [True, False])
def test_a_synchronous_step_waits_for_its_longest_response(embedded: bool) -> None:
    fleet = Fleet(2, ONE_SECOND_PER_TOKEN, embedded=embedded)
    steps = simulate(config_of("synchronous", 4), fleet, in_turn(3, 9, 5, 2, 7, 1, 1, 1), lambda tokens: tokens, 2)
    assert [(step.rollout, step.whole) for step in steps] == [(9, 9 + 19), (7, 7 + 10)]


def test_over_sampling_drops_slow_responses() -> None:
    fleet = Fleet(1, ONE_SECOND_PER_TOKEN)
    lengths = in_turn(3, 9, 3, 3, 3, 3, 3, 3, 3, 9)
    steps = simulate(config_of("over-sampled", 4), fleet, lengths, lambda tokens: 1.0, 2)
    assert [step.rollout for step in steps] == [3, 3]


def test_a_partial_response_continues_where_it_stopped() -> None:
    """The next step waits for the response, as it is the last step that may train on it."""
    fleet = Fleet(1, ONE_SECOND_PER_TOKEN)
    steps = simulate(config_of("partial", 4), fleet, in_turn(3, 9, 3, 3, 3, *[3] * 20), lambda tokens: 1.0, 3)
    assert [step.rollout for step in steps] == [3, 6, 3]


@pytest.mark.parametrize(("training", "wanted"), [(10.0, 10.0), (2.0, 5.0)])
def test_the_longer_of_rollouts_and_training_hides_the_other(training: float, wanted: float) -> None:
    fleet = Fleet(1, ONE_SECOND_PER_TOKEN)
    steps = simulate(config_of("asynchronous", 4), fleet, always(5), lambda tokens: training, 8)
    assert np.mean([step.whole for step in steps[2:]]) == pytest.approx(wanted, rel=0.2)


def test_processes_share_cores() -> None:
    """Four engines on two cores take twice as long; so does an actor of four ranks."""
    times = []
    for cores in (np.inf, 2):
        fleet = Fleet(4, ONE_SECOND_PER_TOKEN, embedded=True, ranks=4, cores=cores)
        times.append(simulate(config_of("synchronous", 4), fleet, always(5), lambda tokens: 3.0, 1)[0])
    assert [(step.rollout, step.whole) for step in times] == [(5, 8), (10, 16)]


def test_an_embedded_engine_continues_with_its_own_share() -> None:
    """Each engine stops when its share of the groups is complete, and the driver waits for both."""
    fleet = Fleet(2, ONE_SECOND_PER_TOKEN, embedded=True)
    lengths = in_turn(2, 4, 2, 8, 2)  # to the first engine: 2, 2, 2
    assert simulate(config_of("over-sampled", 4), fleet, lengths, lambda tokens: 0.0, 1)[0].rollout == 8


def test_rates_depend_on_the_number_of_responses_and_include_prefill() -> None:
    rates = Rates(decode=lambda rows, before: 0.5 * rows, read=lambda prefixes: float(prefixes.sum()), prompt=7.0)
    fleet = Fleet(1, rates)
    steps = simulate(config_of("synchronous", 2), fleet, in_turn(4, 10), lambda tokens: 0.0, 1)
    assert steps[0].rollout == pytest.approx(14 + 4 * 1.0 + 6 * 0.5)
