"""A step's groups: graded, and with dynamic sampling drawn again until all of them teach something."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rl.data.cursor import Cursor
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import RolloutBuffer
from megatron_rl.rollout.collector import Rollouts, roll_out
from megatron_rl.run.run import Run
from megatron_rl.types import Generation, Prompt, RewardResult, Sample, SamplingParams

PROMPTS = 100
FRESH = {"rollout/staleness_max": 0.0, "rollout/staleness_mean": 0.0}


class Engines:
    """Notes the seeds it is asked with; a prompt's responses are its number, first and second. Answers all at once."""

    embedded = True

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.answers: dict[int, list[Generation]] = {}
        self.submitted = 0

    def submit(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, begun: object = None, enough: int | None = None
    ) -> list[int]:
        self.asked.append(([prompt.token_ids[0] for prompt in prompts], sampling.seed))
        numbers = range(self.submitted, self.submitted + len(prompts))
        self.submitted += len(prompts)
        for number, prompt in zip(numbers, prompts, strict=True):
            self.answers[number] = [Generation([prompt.token_ids[0], k], [0.0, 0.0], "stop", 0) for k in (0, 1)]
        return list(numbers)

    def wait(self, numbers: Collection[int]) -> set[int]:
        return set(numbers) & self.answers.keys()

    def take(self, number: int) -> list[Generation]:
        return self.answers.pop(number)

    def cut(self, numbers: Collection[int]) -> None:
        assert not numbers


ROLLOUT = {
    "prompts_per_step": 4,
    "samples_per_prompt": 2,
    "max_response_tokens": 2,
    "temperature": 1.0,
    "dynamic_sampling": True,
    "max_draws": 5,
    "engines": 1,
    "over_sampling": 1.0,
    "max_staleness": 0,
    "asynchronous": False,
}


def run_of(informative: Callable[[int], bool] | set[int], engines: Any = None, **settings: Any) -> Any:
    """A run whose prompts 0, 1, 2, ... come in order; the first response is right where informative, the second never.
    A reward is the score less 0.25."""
    prompts = [Prompt(id=str(i), token_ids=(i,), text="", label=None) for i in range(PROMPTS)]
    rollout = SimpleNamespace(**ROLLOUT | settings)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(
            rollout=rollout,
            train=SimpleNamespace(updates_per_rollout=1, steps=1000),
            seed=3,
            keeps_rollouts=rollout.max_staleness > 0,
            versions_late=rollout.max_staleness,
        ),
        engines=engines or Engines(),
        replay=None,
        cursor=Cursor(PROMPTS, 0, shuffle=False),
        buffer=RolloutBuffer(),
        weight_version=0,
        inputs=SimpleNamespace(
            tokenizer=SimpleNamespace(decode=lambda ids, **_: ""),
            train=SimpleNamespace(prompts=prompts),
            stop_token_ids=(0,),
        ),
        phase=lambda name: nullcontext(),
    )

    def grade(samples: list[Sample]) -> None:
        for sample in samples:
            prompt, k = sample.generation.token_ids[:2]
            good = prompt in informative if isinstance(informative, set) else informative(prompt)
            sample.reward = RewardResult(float(good and k == 0))

    run.grade = grade
    run.check_grades = lambda samples: {"reward/timeout_fraction": len(samples) / 100}
    run.shaped = lambda samples: [sample.reward.score - 0.25 for sample in samples]
    run.sampling = lambda step, draw=0: Run.sampling(run, step, draw)
    return run


def prompts_of(rollouts: Rollouts) -> list[int]:
    return [sample.generation.token_ids[0] for sample in rollouts.samples[::2]]


def test_without_dynamic_sampling_one_draw_is_all() -> None:
    run = run_of({1}, dynamic_sampling=False)
    rollouts = roll_out(run, 1)
    assert prompts_of(rollouts) == [0, 1, 2, 3] and rollouts.groups == [0, 1, 2, 3]
    assert rollouts.sample_rewards.tolist() == [-0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25, -0.25]
    assert rollouts.metrics == {"reward/timeout_fraction": 0.08} | FRESH
    assert rollouts.teaching(np.array([0, 0, 1, -1, 0, 0, 0, 0.0])) == {1}
    assert run.engines.asked == [([0, 1, 2, 3], run.sampling(1).seed)]


def test_groups_that_teach_nothing_are_replaced_until_the_step_is_full() -> None:
    run = run_of({1, 3, 5, 6, 8, 9})
    rollouts = roll_out(run, 1)
    # Half of the first draw was informative, so 2 missing groups take a draw of 4.
    assert [prompts for prompts, _ in run.engines.asked] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert prompts_of(rollouts) == [1, 3, 5, 6]
    assert [sample.group for sample in rollouts.samples] == [1, 1, 3, 3, 5, 5, 6, 6]
    assert rollouts.sample_rewards.tolist() == [0.75, -0.25] * 4
    assert len(rollouts.drawn) == 16
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
    assert rollouts.teaching(np.zeros(8)) == {1, 3, 5, 6}


def test_surplus_groups_are_left_out_and_the_latest_go_first() -> None:
    rollouts = roll_out(run_of({1, 4, 5, 6, 7}), 1)
    assert prompts_of(rollouts) == [1, 4, 5, 6]
    assert rollouts.metrics["rollout/groups_surplus"] == 1


def test_metrics_of_the_grading_are_of_all_draws() -> None:
    """Each draw has random numbers of its own, and as few prompts as will do at the rate so far."""
    run = run_of({0, 1, 2, 4})
    rollouts = roll_out(run, 1)
    assert [prompts for prompts, _ in run.engines.asked] == [[0, 1, 2, 3], [4, 5]]  # 1 missing at a rate of 3/4
    assert len({seed for _, seed in run.engines.asked}) == 2
    assert rollouts.metrics["reward/timeout_fraction"] == pytest.approx(12 / 100)


def test_a_draw_has_a_prompt_for_every_engine() -> None:
    run = run_of({0, 1, 2, 4}, engines=Engines())
    run.config.rollout.engines = 3
    roll_out(run, 1)
    assert [len(prompts) for prompts, _ in run.engines.asked] == [4, 3]


def test_at_its_bound_it_goes_on_with_what_it_has() -> None:
    rollouts = roll_out(run_of({2, 6}, max_draws=2), 1)
    assert prompts_of(rollouts) == [2, 6]
    assert rollouts.metrics["rollout/groups_missing"] == 2


def test_a_step_without_any_informative_group_is_an_error() -> None:
    with pytest.raises(UserError, match=r"step 7: .* each of 8 prompts in 2 draws.*rollout\.dynamic_sampling=false"):
        roll_out(run_of(set(), max_draws=2), 7)


def test_a_resumed_run_draws_the_same() -> None:
    """All that a draw depends on is the cursor, the step and the seed."""
    informative = set(range(0, PROMPTS, 3))
    straight, first, resumed = run_of(informative), run_of(informative), run_of(informative)
    for step in (1, 2, 3):
        roll_out(straight, step)
    for step in (1, 2):
        roll_out(first, step)
    resumed.cursor.load_state(first.cursor.state())
    roll_out(resumed, 3)
    assert first.engines.asked + resumed.engines.asked == straight.engines.asked


def test_fresh_tokens_are_those_of_the_weights_in_training() -> None:
    prompt = Prompt("p:0", (1,), "", None)
    gone_on_with = Generation([5, 6, 7], [0.0] * 3, "stop", 3, ((2, 4),))
    begun_now = Generation([5, 6], [0.0] * 2, "stop", 4)
    drawn = [Sample(prompt, group, g, "") for group, g in enumerate([gone_on_with, begun_now, begun_now])]
    step = Rollouts(drawn=drawn, groups=[0, 2], weight_version=4)
    assert step.fresh.tolist() == [False, False, True, True, True]
    replayed = Rollouts(drawn=drawn, groups=[0, 2])
    assert replayed.fresh.tolist() == [False] * 5
