"""A step's rollouts: sampled, graded and, with dynamic sampling, drawn again until every group teaches something.

Dynamic sampling (DAPO, arXiv 2503.14476) leaves out groups whose responses all have the same score, which no
group-relative advantage can tell apart, and draws other prompts in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.rows import Array
from megatron_rl.errors import UserError
from megatron_rl.rollout.collect import collect
from megatron_rl.types import Sample

if TYPE_CHECKING:
    from megatron_rl.session.run import Run


@dataclass
class Rollouts:
    """What a step sampled, and what of it is trained on."""

    drawn: list[Sample] = field(default_factory=list)
    """All of it, group after group."""
    rewards: list[float] = field(default_factory=list)
    """Of `drawn`."""
    groups: list[int] = field(default_factory=list)
    """The groups to train on, in the order they were drawn."""
    informative: set[int] = field(default_factory=set)
    """With dynamic sampling: the drawn groups whose scores differ, surplus ones too."""
    draws: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """How grading went, and what dynamic sampling cost."""

    @property
    def samples(self) -> list[Sample]:
        """To train on, N of them."""
        chosen = set(self.groups)
        return [sample for sample in self.drawn if sample.group in chosen]

    @property
    def sample_rewards(self) -> Array:
        """[N], fp64."""
        chosen = set(self.groups)
        pairs = zip(self.drawn, self.rewards, strict=True)
        return np.array([reward for sample, reward in pairs if sample.group in chosen], dtype=np.float64)

    def teaching(self, advantages: Array) -> set[int]:
        """The drawn groups with an advantage [N], or that would have had one."""
        pairs = zip(self.samples, advantages, strict=True)
        return self.informative | {sample.group for sample, advantage in pairs if advantage != 0}


def roll_out(run: Run, step: int) -> Rollouts:
    """The step's `rollout.prompts_per_step` groups; fewer only where dynamic sampling reached its bound."""
    settings = run.config.rollout
    if run.replay:
        return replayed(run.replay.samples(step), run.shaped)
    rollouts, wanted = Rollouts(), settings.prompts_per_step
    if not settings.dynamic_sampling:
        _draw(run, step, rollouts, wanted)
        rollouts.groups = list(range(wanted))
        return rollouts
    while rollouts.draws < settings.max_draws and len(rollouts.informative) < wanted:
        _draw(run, step, rollouts, _next_count(run, rollouts))
        rollouts.informative = informative_groups(rollouts.drawn)
    if not rollouts.informative:
        raise UserError(
            f"step {step}: all responses to a prompt had the same score, for each of {_prompts(rollouts)} prompts in "
            f"{rollouts.draws} draws: the task is too easy or too hard for this policy, or the verifier is at fault. "
            "Look at the responses with rollout.dynamic_sampling=false observability.rollouts_every=1"
        )
    rollouts.groups = sorted(rollouts.informative)[:wanted]
    rollouts.metrics |= {
        "rollout/draws": float(rollouts.draws),
        "rollout/prompts_drawn": float(_prompts(rollouts)),
        "rollout/groups_missing": float(wanted - len(rollouts.groups)),
        "rollout/groups_surplus": float(len(rollouts.informative) - len(rollouts.groups)),
    }
    return rollouts


def replayed(samples: list[Sample], rewards_of: Callable[[list[Sample]], list[float]]) -> Rollouts:
    """Recorded rollouts, to train on all of them."""
    return Rollouts(drawn=samples, rewards=rewards_of(samples), groups=sorted({sample.group for sample in samples}))


def informative_groups(samples: list[Sample]) -> set[int]:
    """Groups in which the verifier's scores differ."""
    scores: dict[int, set[float]] = {}
    for sample in samples:
        if sample.reward is None:
            raise ValueError(f"a sample of {sample.prompt.id} was not graded")
        scores.setdefault(sample.group, set()).add(sample.reward.score)
    return {group for group, found in scores.items() if len(found) > 1}


def _draw(run: Run, step: int, rollouts: Rollouts, count: int) -> None:
    """Add `count` groups. Every draw has random numbers of its own, from seed, step and draw."""
    with run.phase("rollout"):
        samples = collect(
            run.engines,
            run.next_prompts(count),
            run.sampling(step, rollouts.draws),
            run.inputs.tokenizer,
            first_group=_prompts(rollouts),
        )
    with run.phase("reward"):
        rollouts.rewards += run.grade(samples)
    before, new = len(rollouts.drawn), len(samples)
    for name, rate in run.grading_metrics.items():
        rollouts.metrics[name] = (rollouts.metrics.get(name, 0.0) * before + rate * new) / (before + new)
    rollouts.drawn += samples
    rollouts.draws += 1


def _next_count(run: Run, rollouts: Rollouts) -> int:
    """Prompts to draw for what is missing, at the rate at which groups were informative so far."""
    settings = run.config.rollout
    missing, found = settings.prompts_per_step - len(rollouts.informative), len(rollouts.informative)
    count = math.ceil(missing * _prompts(rollouts) / found) if found else settings.prompts_per_step
    return min(max(count, settings.engines), settings.prompts_per_step)


def _prompts(rollouts: Rollouts) -> int:
    return rollouts.drawn[-1].group + 1 if rollouts.drawn else 0
