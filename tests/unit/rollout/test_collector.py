"""A step's groups: graded, and with dynamic sampling drawn again until all of them have a signal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rl.data.cursor import Cursor
from megatron_rl.errors import UserError
from megatron_rl.rollout.collector import GroupFilter, RolloutCollector
from megatron_rl.rollout.group_filter import group_filter_of, has_signal
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.run.sampling import step_sampling
from megatron_rl.types import Prompt, Response, RewardResult, SamplingParams

PROMPTS = 100
FRESH = {"rollout/staleness_max": 0.0, "rollout/staleness_mean": 0.0}


class Engines:
    """Notes the prompts and the seed of each request. The responses to a prompt are its number, first and second. All
    of them are ready at once."""

    embedded = True

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.answers: dict[int, list[Response]] = {}
        self.submitted = 0

    def submit(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None, min_groups: int | None = None
    ) -> list[int]:
        self.asked.append(([prompt.token_ids[0] for prompt in prompts], sampling.seed))
        numbers = range(self.submitted, self.submitted + len(prompts))
        self.submitted += len(prompts)
        for number, prompt in zip(numbers, prompts, strict=True):
            self.answers[number] = [Response([prompt.token_ids[0], k], [0.0, 0.0], "stop", 0) for k in (0, 1)]
        return list(numbers)

    def wait(self, numbers: Collection[int]) -> set[int]:
        return set(numbers) & self.answers.keys()

    def take(self, number: int) -> list[Response]:
        return self.answers.pop(number)

    def abort(self, numbers: Collection[int]) -> None:
        assert not numbers

    def suspend(self, numbers: Collection[int]) -> set[int]:
        assert not numbers
        return set()


class Grader:
    """Gives the first response to a prompt a score of 1 if the prompt has a signal, and every other response 0."""

    def __init__(self, with_signal: Callable[[int], bool]) -> None:
        self.with_signal = with_signal

    def grade(self, pairs: Sequence[tuple[Prompt, Response]]) -> list[RewardResult]:
        results = []
        for prompt, response in pairs:
            row, k = response.token_ids[:2].tolist()
            assert prompt.token_ids == (row,)
            results.append(RewardResult(float(self.with_signal(row) and k == 0), text=f"{row} {k}"))
        return results

    def check(self, graded: Sequence[tuple[Prompt, RewardResult]]) -> dict[str, float]:
        return {"reward/timeout_fraction": len(graded) / 100}


ROLLOUT = {
    "prompts_per_step": 4,
    "samples_per_prompt": 2,
    "max_response_tokens": 2,
    "temperature": 1.0,
    "dynamic_sampling": True,
    "group_filter": None,
    "max_draws": 5,
    "engines": 1,
    "over_sampling": 1.0,
    "max_staleness": 0,
    "asynchronous": False,
}


def collector_of(
    with_signal: Callable[[int], bool] | Collection[int],
    engines: Any = None,
    group_filter: GroupFilter | None = None,
    **settings: Any,
) -> RolloutCollector:
    """A collector whose prompts 0, 1, 2, ... come in order. `with_signal`: prompts whose responses differ in score."""
    rollout: Any = SimpleNamespace(**ROLLOUT | settings)
    config: Any = SimpleNamespace(
        rollout=rollout,
        train=SimpleNamespace(updates_per_rollout=1, steps=1000),
        seed=3,
        keeps_rollouts=rollout.max_staleness > 0,
        versions_late=rollout.max_staleness,
    )
    return RolloutCollector(
        config,
        engines or Engines(),
        [Prompt(id=str(i), token_ids=(i,), text="", label=None) for i in range(PROMPTS)],
        Cursor(PROMPTS, 0, shuffle=False),
        Grader(with_signal if callable(with_signal) else set(with_signal).__contains__),
        partial(step_sampling, config, (0,)),
        lambda name: nullcontext(),
        group_filter or group_filter_of(rollout),
    )


def prompts_of(rollouts: Rollouts) -> list[int]:
    return [prompt.token_ids[0] for prompt, _, _ in rollouts.responses[::2]]


def asked(collector: RolloutCollector) -> list[list[int]]:
    """The prompts of each draw."""
    engines: Any = collector.engines
    return [prompts for prompts, _ in engines.asked]


def test_without_dynamic_sampling_one_draw_is_enough() -> None:
    collector: Any = collector_of({1}, dynamic_sampling=False)
    rollouts = collector.collect(1, 0)
    assert prompts_of(rollouts) == [0, 1, 2, 3] and rollouts.group_numbers.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [reward.score for _, _, reward in rollouts.responses] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert [reward.text for _, _, reward in rollouts.responses[:3]] == ["0 0", "0 1", "1 0"]
    assert rollouts.metrics == {"reward/timeout_fraction": 0.08} | FRESH
    assert rollouts.weight_version == 0 and not rollouts.drops_groups
    assert rollouts.signal_fraction(np.array([0, 0, 1, -1, 0, 0, 0, 0.0])) == 1 / 4
    assert collector.engines.asked == [([0, 1, 2, 3], collector.sampling(1, 0).seed)]


def test_groups_without_signal_are_replaced_until_the_step_is_full() -> None:
    collector = collector_of({1, 3, 5, 6, 8, 9})
    rollouts = collector.collect(1, 0)
    # Half of the first draw had a signal, so 2 missing groups take a draw of 4.
    assert asked(collector) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert prompts_of(rollouts) == [1, 3, 5, 6]
    assert rollouts.group_numbers.tolist() == [1, 1, 3, 3, 5, 5, 6, 6]
    assert [group.number for group in rollouts.groups] == [1, 3, 5, 6]
    assert [reward.score for _, _, reward in rollouts.responses] == [1, 0] * 4
    assert sum(len(group.responses) for group in rollouts.sampled) == 16
    assert (
        rollouts.metrics
        == {
            "reward/timeout_fraction": 0.16,
            "rollout/draws": 2.0,
            "rollout/prompts_drawn": 8.0,
            "rollout/groups_missing": 0.0,
            "rollout/groups_surplus": 0.0,
            "rollout/groups_unfinished": 0.0,
        }
        | FRESH
    )
    assert rollouts.signal_fraction(np.zeros(8)) == 4 / 8


def test_surplus_groups_are_left_out_and_the_latest_go_first() -> None:
    rollouts = collector_of({1, 4, 5, 6, 7}).collect(1, 0)
    assert prompts_of(rollouts) == [1, 4, 5, 6]
    assert rollouts.metrics["rollout/groups_surplus"] == 1


def test_metrics_of_the_grading_cover_all_draws() -> None:
    """Each draw has random numbers of its own, and as few prompts as suffice at the rate so far."""
    collector: Any = collector_of({0, 1, 2, 4})
    rollouts = collector.collect(1, 0)
    assert asked(collector) == [[0, 1, 2, 3], [4, 5]]  # 1 missing at a rate of 3/4
    assert len({seed for _, seed in collector.engines.asked}) == 2
    assert rollouts.metrics["reward/timeout_fraction"] == pytest.approx(12 / 100)


def test_a_draw_has_a_prompt_for_every_engine() -> None:
    collector = collector_of({0, 1, 2, 4}, engines=Engines())
    collector.settings.engines = 3
    collector.collect(1, 0)
    assert [len(prompts) for prompts in asked(collector)] == [4, 3]


def test_a_step_at_its_bound_continues_with_the_groups_it_has() -> None:
    rollouts = collector_of({2, 6}, max_draws=2).collect(1, 0)
    assert prompts_of(rollouts) == [2, 6]
    assert rollouts.metrics["rollout/groups_missing"] == 2


def test_a_step_without_any_group_with_signal_is_an_error() -> None:
    with pytest.raises(UserError, match=r"step 7: .* each of 8 prompts in 2 draws.*rollout\.dynamic_sampling=false"):
        collector_of(set(), max_draws=2).collect(7, 0)


def test_a_group_filter_that_leaves_out_everything_is_named() -> None:
    collector = collector_of({0}, max_draws=2, group_filter=lambda group: False)
    collector.settings.group_filter = "mine:none"
    words = r"step 7: rollout\.group_filter \(mine:none\) left out the group of each of 8 prompts in 2 draws"
    with pytest.raises(UserError, match=rf"{words}.*rollout\.group_filter=null"):
        collector.collect(7, 0)


def test_groups_without_tokens_have_no_staleness() -> None:
    engines: Any = Engines()
    engines.take = lambda number: [Response([], [], "stop", 5)] * 2
    grader: Any = SimpleNamespace(
        grade=lambda pairs: [RewardResult(0.0)] * len(pairs), check=lambda graded: {"reward/timeout_fraction": 0.0}
    )
    collector = collector_of({0}, engines=engines, dynamic_sampling=False)
    collector.grader = grader
    assert collector.collect(1, 5).metrics == {"reward/timeout_fraction": 0.0} | FRESH


def test_a_resumed_run_draws_the_same() -> None:
    """A draw depends on the cursor, the step and the seed alone."""
    with_signal = set(range(0, PROMPTS, 3))
    straight, first, resumed = (collector_of(with_signal) for _ in range(3))
    for step in (1, 2, 3):
        straight.collect(step, 0)
    for step in (1, 2):
        first.collect(step, 0)
    resumed.cursor.load_state(first.cursor.state())
    resumed.collect(3, 0)
    all_asked: list[Any] = [collector.engines.asked for collector in (first, resumed, straight)]  # type: ignore[attr-defined]
    assert all_asked[0] + all_asked[1] == all_asked[2]


def test_a_group_filter_decides_which_groups_are_trained_on() -> None:
    rollouts = collector_of(set(), group_filter=lambda group: group.prompt.token_ids[0] % 2 == 1).collect(1, 0)
    assert prompts_of(rollouts) == [1, 3, 5, 7] and rollouts.drops_groups
    assert rollouts.trained.tolist() == [False, True] * 4


def only_even(group: Any) -> bool:
    return bool(group.prompt.token_ids[0] % 2 == 0)


def fails(group: Any) -> bool:
    raise KeyError("no such label")


def test_an_error_of_an_own_group_filter_names_the_setting_and_the_line() -> None:
    settings: Any = SimpleNamespace(group_filter=f"{__name__}:fails", dynamic_sampling=False)
    collector = collector_of(set(), group_filter=group_filter_of(settings))
    words = r"rollout\.group_filter='.*:fails': KeyError in .*test_collector\.py, line \d+: 'no such label'"
    with pytest.raises(UserError, match=words):
        collector.collect(1, 0)


def test_the_group_filter_is_dynamic_sampling_or_an_imported_function() -> None:
    settings: Any = SimpleNamespace(group_filter=None, dynamic_sampling=False)
    assert group_filter_of(settings) is None
    settings.dynamic_sampling = True
    assert group_filter_of(settings) is has_signal
    settings.group_filter = f"{__name__}:only_even"
    rollouts = collector_of(set(), group_filter=group_filter_of(settings)).collect(1, 0)
    assert prompts_of(rollouts) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"over_sampling": 1.5},
        {"over_sampling": 1.5, "max_staleness": 1},
        {"max_staleness": 1, "asynchronous": True},
    ],
)
def test_a_failure_beside_equal_scores_is_no_signal(mode: dict[str, Any]) -> None:
    """Prompts 0, 4, 8, ... have two scores that differ. Of the others, the second response could not be graded."""
    collector = collector_of(lambda row: True, samples_per_prompt=2, max_draws=50, **mode)

    def grade(pairs: Sequence[tuple[Prompt, Response]]) -> list[RewardResult]:
        return [
            RewardResult(1.0 - k, outcome="timeout" if k and row % 4 else "score", text=f"{row} {k}")
            for row, k in (response.token_ids[:2].tolist() for _, response in pairs)
        ]

    collector.grader = SimpleNamespace(grade=grade, check=lambda graded: {})
    for step in (1, 2):
        rollouts = collector.collect(step, 0)
        assert all(row % 4 == 0 for row in prompts_of(rollouts)) and len(rollouts.groups) == 4
        assert all(group.scores == [1.0, 0.0] for group in rollouts.groups)
        left_out = [group for group in rollouts.sampled if group.prompt.token_ids[0] % 4]
        assert left_out and all(group.scores == [1.0] for group in left_out)
