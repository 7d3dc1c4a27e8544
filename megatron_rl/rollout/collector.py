"""A step's rollouts: prompts are drawn, sampled and graded until the step has its groups.

Dynamic sampling (DAPO, arXiv 2503.14476) leaves out groups whose responses all have the same score, which no
group-relative advantage can tell apart, and draws other prompts in their place. With over-sampling, more prompts are
under way than are needed, and nobody waits for the slowest. What is left over is dropped, or goes on at the next step
(`rollout.max_staleness`): see docs/rollouts.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.sequences import Array
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.replay import NoEngines
from megatron_rl.types import Generation, Sample

if TYPE_CHECKING:
    from megatron_rl.run.run import Run


@dataclass
class Rollouts:
    """What a step sampled, and what of it is trained on."""

    drawn: list[Sample] = field(default_factory=list)
    """All of it, group after group."""
    rewards: list[float] = field(default_factory=list)
    """Of `drawn`."""
    groups: list[int] = field(default_factory=list)
    """The groups to train on, the oldest first."""
    informative: set[int] = field(default_factory=set)
    """With dynamic sampling: the drawn groups whose scores differ, surplus ones too."""
    metrics: dict[str, float] = field(default_factory=dict)
    """How grading went, and what became of the prompts."""
    weight_version: int | None = None
    """Of the weights that the step trains; None where samples are replayed, whose versions are another run's."""

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

    @property
    def fresh(self) -> Array:
        """[T] bool, over the response tokens of `samples`: those that the weights in training sampled."""
        return np.concatenate([self._is_fresh(sample.generation) for sample in self.samples])

    def _is_fresh(self, generation: Generation) -> Array:
        if generation.version_changes:
            return np.array(generation.weight_versions) == self.weight_version
        return np.full(len(generation.token_ids), generation.weight_version == self.weight_version)

    def teaching(self, advantages: Array) -> set[int]:
        """The drawn groups with an advantage [N], or that would have had one."""
        pairs = zip(self.samples, advantages, strict=True)
        return self.informative | {sample.group for sample, advantage in pairs if advantage != 0}


def roll_out(run: Run, step: int) -> Rollouts:
    """The step's `rollout.prompts_per_step` groups; fewer only where dynamic sampling reached its bound."""
    if run.replay:
        return replayed(run.replay.samples(step), run.shaped)
    refill = RolloutCollector(run, step)
    while refill.goes_on:
        refill.ask()
        refill.receive()
    return refill.close()


def replayed(samples: list[Sample], rewards_of: Callable[[list[Sample]], list[float]]) -> Rollouts:
    """Recorded rollouts, to train on all of them."""
    return Rollouts(drawn=samples, rewards=rewards_of(samples), groups=sorted({sample.group for sample in samples}))


class RolloutCollector:
    """One step's way from prompts to groups."""

    def __init__(self, run: Run, step: int) -> None:
        assert not isinstance(run.engines, NoEngines)
        self.run, self.step, self.engines, self.buffer = run, step, run.engines, run.buffer
        self.settings = run.config.rollout
        self.draws = self.drawn = self.begun_anew = 0
        self.graded: list[Group] = []
        """In this step."""
        self.left_out: list[Group] = []
        """Of `graded`, those that nobody will train on."""
        self._samples: dict[int, list[Sample]] = {}
        left, self.buffer.waiting, self.buffer.whole = [*self.buffer.waiting, *self.buffer.whole], [], []
        for group in left:
            self._keep(group)

    # ------------------------------------------------------------------ how far it is

    @property
    def goes_on(self) -> bool:
        """Until there are enough groups, and no more are left than later steps can train on before they are too old.
        Only over-sampling leaves slow groups out for being slow."""
        unfinished = self.buffer.unfinished
        if self._missing > 0:
            return bool(unfinished) or self._drawable > 0
        if self.run.config.keeps_rollouts:
            return bool(self._due())
        return self.settings.over_sampling == 1 and bool(unfinished)

    @property
    def _missing(self) -> int:
        return self.settings.prompts_per_step - len(self.buffer.whole)

    @property
    def _drawable(self) -> int:
        settings = self.settings
        return math.ceil(settings.max_draws * settings.prompts_per_step * settings.over_sampling) - self.drawn

    @property
    def _expected(self) -> int:
        """Prompts it takes for the groups that are missing, at the rate at which they were informative so far."""
        whole, found = len(self.graded), len(self.graded) - len(self.left_out)
        most = self.settings.prompts_per_step
        if not whole:
            return self._missing
        return min(math.ceil(self._missing * whole / found), most) if found else most

    @property
    def _oldest(self) -> int:
        """The oldest weight version that may have sampled what this step trains on."""
        return self.run.weight_version - self.run.config.versions_late

    def _due(self) -> list[Group]:
        """Unfinished groups to wait for: were the oldest whole ones trained on now, a later step would find more on
        their last occasion than it has room for."""
        buffer, most = self.buffer, self.settings.prompts_per_step
        left = sorted(buffer.whole, key=lambda group: group.age)[most:] + buffer.unfinished
        for later in range(self.settings.max_staleness):
            oldest = self._oldest + (later + 1) * self.run.config.train.updates_per_rollout
            ending = [group for group in left if group.oldest_version < oldest]
            if len(ending) > later * most:
                return [group for group in ending if not group.whole]
        return []

    # ------------------------------------------------------------------ engines

    def ask(self) -> None:
        """Have engines at work on as many prompts as it takes. Every draw has random numbers of its own, from seed,
        step and draw."""
        buffer, settings = self.buffer, self.settings
        enough = None
        if self._missing > 0:
            expected = self._expected
            if settings.dynamic_sampling and not buffer.unfinished:
                expected = max(expected, settings.engines)
            new = math.ceil(expected * settings.over_sampling) - len(buffer.unfinished)
            groups = buffer.waiting + self._draw(min(new, self._drawable))
            if settings.over_sampling > 1:
                enough = expected
        else:
            due = {group.number for group in self._due()}
            groups = [group for group in buffer.waiting if group.number in due]
        if not groups:
            return
        version = self.run.weight_version
        groups = [g if g.responses else g.begun_anew(version) for g in sorted(groups, key=lambda g: g.number)]
        asked = {group.number for group in groups}
        buffer.waiting = [group for group in buffer.waiting if group.number not in asked]
        prompts = [self.run.inputs.train.prompts[group.row] for group in groups]
        sampling = self.run.sampling(self.step, self.draws)
        with self.run.phase("rollout"):
            numbers = self.engines.submit(prompts, sampling, [group.responses for group in groups], enough)
        buffer.under_way |= zip(numbers, groups, strict=True)
        self.draws += 1

    def receive(self) -> None:
        """Wait until there is something of what is under way, and grade it."""
        with self.run.phase("rollout"):
            there = self.engines.wait(self.buffer.under_way)
        self._take_in(there)
        if len(self.graded) >= self.settings.prompts_per_step:
            self._check_grades()

    def _draw(self, count: int) -> list[Group]:
        count, first = max(count, 0), self.run.cursor.taken
        self.drawn += count
        rows = enumerate(self.run.cursor.take(count), start=first)
        return [Group(number, row, self.run.weight_version) for number, row in rows]

    def _take_in(self, requests: Collection[int]) -> None:
        answered = [self.buffer.under_way.pop(number).answered(self.engines.take(number)) for number in requests]
        samples = {group.number: self._samples_of(group) for group in answered if group.whole}
        with self.run.phase("reward"):
            self.run.grade([sample for part in samples.values() for sample in part])
        for group in sorted(answered, key=lambda group: group.number):
            if not group.whole:
                self._keep(group)
                continue
            self._samples[group.number] = samples[group.number]
            group = replace(group, rewards=tuple(s.reward for s in samples[group.number] if s.reward))
            self.graded.append(group)
            if group.informative or not self.settings.dynamic_sampling:
                self._keep(group)
            else:
                self.left_out.append(group)

    def _keep(self, group: Group) -> None:
        """For this step or a later one; what is too old is begun anew."""
        if group.responses and group.oldest_version < self._oldest:
            self.begun_anew += 1
            group = group.begun_anew(self.run.weight_version)
        self.buffer.put(group)

    def _samples_of(self, group: Group) -> list[Sample]:
        prompt, decode = self.run.inputs.train.prompts[group.row], self.run.inputs.tokenizer.decode
        rewards = group.rewards or [None] * len(group.responses)
        return [
            Sample(prompt, 0, generation, decode(generation.token_ids, skip_special_tokens=True), reward)
            for generation, reward in zip(group.responses, rewards, strict=True)
        ]

    # ------------------------------------------------------------------ the end

    def close(self) -> Rollouts:
        """The step's groups. What is left goes on at the next step, at once in an asynchronous run."""
        run, buffer, settings = self.run, self.buffer, self.settings
        if not settings.asynchronous:
            with run.phase("rollout"):
                self.engines.cut(buffer.under_way)
            self._take_in(list(buffer.under_way))
        rates = self._check_grades()
        buffer.whole.sort(key=lambda group: group.age)
        chosen, buffer.whole = buffer.whole[: settings.prompts_per_step], buffer.whole[settings.prompts_per_step :]
        if not chosen:
            raise UserError(
                f"step {self.step}: all responses to a prompt had the same score, for each of {self.drawn} prompts in "
                f"{self.draws} draws: the task is too easy or too hard for this policy, or the verifier is at fault. "
                "Look at the responses with rollout.dynamic_sampling=false observability.rollouts_every=1"
            )
        rollouts = self._rollouts(chosen, buffer.whole)
        rollouts.metrics = rates | self._metrics(chosen)
        if not run.config.keeps_rollouts:
            buffer.waiting, buffer.whole = [], []
        if settings.asynchronous and self.step < run.config.train.steps:
            self.drawn = 0
            self.ask()
        return rollouts

    def _rollouts(self, chosen: list[Group], surplus: list[Group]) -> Rollouts:
        """Surplus groups are counted as drawn when they are used; where none is kept, now."""
        shown = [*chosen, *self.left_out, *([] if self.run.config.keeps_rollouts else surplus)]
        shown.sort(key=lambda group: group.age)
        drawn = []
        for place, group in enumerate(shown):
            for sample in self._samples.get(group.number) or self._samples_of(group):
                sample.group = place
                drawn.append(sample)
        numbers = {group.number for group in chosen}
        return Rollouts(
            weight_version=self.run.weight_version,
            drawn=drawn,
            rewards=self.run.shaped(drawn),
            groups=[place for place, group in enumerate(shown) if group.number in numbers],
            informative={place for place, group in enumerate(shown) if group.informative}
            if self.settings.dynamic_sampling
            else set(),
        )

    def _check_grades(self) -> dict[str, float]:
        return self.run.check_grades([sample for group in self.graded for sample in self._samples[group.number]])

    def _metrics(self, chosen: list[Group]) -> dict[str, float]:
        settings, run = self.settings, self.run
        versions = np.array([v for group in chosen for r in group.responses for v in r.weight_versions] or [0])
        found = {
            "rollout/staleness_max": float(run.weight_version - versions.min()),
            "rollout/staleness_mean": float(run.weight_version - versions.mean()),
        }
        if settings.dynamic_sampling or settings.over_sampling > 1:
            found |= {
                "rollout/draws": float(self.draws),
                "rollout/prompts_drawn": float(self.drawn),
                "rollout/groups_missing": float(settings.prompts_per_step - len(chosen)),
                "rollout/groups_surplus": float(len(self.buffer.whole)),
                "rollout/groups_unfinished": float(len(self.buffer.unfinished)),
            }
        if run.config.keeps_rollouts:
            found["rollout/groups_begun_anew"] = float(self.begun_anew)
        return found
