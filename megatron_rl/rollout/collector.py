"""Collects a step's rollouts: prompts are drawn, sampled and graded until the step has its groups.

Dynamic sampling (DAPO, arXiv 2503.14476) leaves out groups whose responses all have the same score, because no
group-relative advantage can tell these apart, and draws other prompts in their place. With over-sampling, more prompts
are in flight than the step needs, so that the step does not wait for the slowest. Groups that are left over are
dropped, or continue at the next step if `rollout.max_staleness` allows: see docs/rollouts.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import numpy as np

from megatron_rl.config import Config
from megatron_rl.data.cursor import Cursor
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group, RolloutBuffer
from megatron_rl.rollout.rollouts import Rollouts, tokens_per_version
from megatron_rl.types import Prompt, Response, RewardResult, SamplingParams

GroupFilter = Callable[[Group], bool]
"""Decides whether a graded group is trained on."""


class Sampler(Protocol):
    """What samples responses; see `cluster.engines.Engines` and `agent.rollouts.AgentRollouts`."""

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        partial: Sequence[tuple[Response, ...]] | None = None,
        min_groups: int | None = None,
    ) -> list[int]: ...

    def wait(self, numbers: Iterable[int]) -> set[int]: ...

    def take(self, number: int) -> list[Response]: ...

    def abort(self, numbers: Iterable[int]) -> None: ...

    def suspend(self, numbers: Iterable[int]) -> set[int]: ...


class GroupGrader(Protocol):
    """Grades responses; see `reward.grading.Grading`."""

    def grade(self, pairs: Sequence[tuple[Prompt, Response]]) -> list[RewardResult]: ...

    def check(self, graded: Sequence[tuple[Prompt, RewardResult]]) -> dict[str, float]: ...


class RolloutCollector:
    """Collects the rollouts of one step after another, and keeps what a step leaves to later ones."""

    def __init__(
        self,
        config: Config,
        engines: Sampler,
        prompts: Sequence[Prompt],
        cursor: Cursor,
        grader: GroupGrader,
        sampling: Callable[[int, int], SamplingParams],
        phase: Callable[[str], AbstractContextManager[None]],
        group_filter: GroupFilter | None = None,
    ) -> None:
        """`sampling`: (step, draw) -> parameters. `group_filter`: None trains on every group."""
        self.config, self.settings = config, config.rollout
        self.engines, self.prompts, self.cursor, self.grader = engines, prompts, cursor, grader
        self.sampling, self.phase, self.group_filter = sampling, phase, group_filter
        self.buffer = RolloutBuffer()
        self._drawn = 0

    def collect(self, step: int, weight_version: int) -> Rollouts:
        """Returns `rollout.prompts_per_step` groups, or fewer if dynamic sampling reached its bound."""
        self._begin(step, weight_version)
        while self._goes_on:
            self._ask()
            self._receive()
        return self._end()

    @property
    def pending(self) -> list[Group]:
        """The groups that the steps so far leave to later ones; a checkpoint holds them."""
        return self.buffer.groups

    def _begin(self, step: int, weight_version: int) -> None:
        self.step, self.weight_version = step, weight_version
        self._draws = self._drawn = self._restarted = 0
        self._graded: list[Group] = []
        """Groups graded in this step."""
        self._left_out: list[Group] = []
        """Groups of `_graded` that no step will train on."""
        left = [*self.buffer.waiting, *self.buffer.complete]
        self.buffer.waiting, self.buffer.complete = [], []
        for group in left:
            self._keep(group)

    # ------------------------------------------------------------------ progress of the step

    @property
    def _goes_on(self) -> bool:
        """True until the step has enough groups, and no more groups are left than later steps can train on before these
        are too old. Without over-sampling, no group is left out for being slow."""
        incomplete = self.buffer.incomplete
        if self._missing > 0:
            return bool(incomplete) or self._drawable > 0
        if self.config.keeps_rollouts:
            return bool(self._due())
        return self.settings.over_sampling == 1 and bool(incomplete)

    @property
    def _missing(self) -> int:
        return self.settings.prompts_per_step - len(self.buffer.complete)

    @property
    def _drawable(self) -> int:
        settings = self.settings
        return math.ceil(settings.max_draws * settings.prompts_per_step * settings.over_sampling) - self._drawn

    @property
    def _expected(self) -> int:
        """Number of prompts needed for the missing groups, at the rate at which groups passed the filter so far."""
        graded, passed = len(self._graded), len(self._graded) - len(self._left_out)
        most = self.settings.prompts_per_step
        if not graded:
            return self._missing
        return min(math.ceil(self._missing * graded / passed), most) if passed else most

    @property
    def _oldest(self) -> int:
        """Oldest weight version that may have sampled what this step trains on."""
        return self.weight_version - self.config.versions_late

    def _due(self) -> list[Group]:
        """Incomplete groups to wait for: if the step trained on the oldest complete groups now, a later step would find
        more groups at their last opportunity than it has room for."""
        buffer, most = self.buffer, self.settings.prompts_per_step
        left = sorted(buffer.complete, key=lambda group: group.age)[most:] + buffer.incomplete
        for later in range(self.settings.max_staleness):
            oldest = self._oldest + (later + 1) * self.config.train.updates_per_rollout
            expiring = [group for group in left if group.oldest_version < oldest]
            if len(expiring) > later * most:
                return [group for group in expiring if not group.complete]
        return []

    # ------------------------------------------------------------------ engines

    def _ask(self) -> None:
        """Submits as many prompts as the step needs. Seed, step and draw determine the random numbers of a draw."""
        buffer, settings = self.buffer, self.settings
        min_groups = None
        if self._missing > 0:
            expected = self._expected
            if self.group_filter and not buffer.incomplete:
                expected = max(expected, settings.engines)
            new = math.ceil(expected * settings.over_sampling) - len(buffer.incomplete)
            groups = buffer.waiting + self._draw(min(new, self._drawable))
            if settings.over_sampling > 1:
                min_groups = expected
        else:
            due = {group.number for group in self._due()}
            groups = [group for group in buffer.waiting if group.number in due]
        if not groups:
            return
        groups = [g if g.responses else g.restarted(self.weight_version) for g in sorted(groups, key=_number)]
        asked = {group.number for group in groups}
        buffer.waiting = [group for group in buffer.waiting if group.number not in asked]
        with self.phase("rollout"):
            numbers = self.engines.submit(
                [group.prompt for group in groups],
                self.sampling(self.step, self._draws),
                [group.responses for group in groups],
                min_groups,
            )
        buffer.in_flight |= zip(numbers, groups, strict=True)
        self._draws += 1

    def _receive(self) -> None:
        """Waits for at least one of the groups in flight, and grades what has arrived."""
        with self.phase("rollout"):
            arrived = self.engines.wait(self.buffer.in_flight)
        self._take_in(arrived)
        if len(self._graded) >= self.settings.prompts_per_step:
            self._check_grades()

    def _draw(self, count: int) -> list[Group]:
        count, first = max(count, 0), self.cursor.taken
        self._drawn += count
        rows = enumerate(self.cursor.take(count), start=first)
        return [Group(number, row, self.prompts[row], self.weight_version) for number, row in rows]

    def _take_in(self, requests: Collection[int]) -> None:
        """Grades the complete groups among the answers, and sorts all of them into the buffer or out."""
        with self.phase("rollout"):
            answered = [self.buffer.in_flight.pop(number).answered(self.engines.take(number)) for number in requests]
        answered.sort(key=_number)
        complete = [group for group in answered if group.complete]
        with self.phase("reward"):
            results = iter(self.grader.grade([(g.prompt, response) for g in complete for response in g.responses]))
        for group in answered:
            if group.complete:
                group = replace(group, rewards=tuple(next(results) for _ in group.responses))
                self._graded.append(group)
                if self.group_filter and not self.group_filter(group):
                    self._left_out.append(group)
                    continue
            self._keep(group)

    def _keep(self, group: Group) -> None:
        """Keeps a group for this step or a later one; a group that is too old is restarted."""
        if group.responses and group.oldest_version < self._oldest:
            self._restarted += 1
            group = group.restarted(self.weight_version)
        self.buffer.put(group)

    # ------------------------------------------------------------------ end of the step

    def _end(self) -> Rollouts:
        """Returns the step's groups. What is left continues at the next step, or at once in an asynchronous run."""
        buffer, settings = self.buffer, self.settings
        if not settings.asynchronous:
            self._take_in(self._stopped())
        rates = self._check_grades()
        buffer.complete.sort(key=lambda group: group.age)
        chosen, surplus = buffer.complete[: settings.prompts_per_step], buffer.complete[settings.prompts_per_step :]
        buffer.complete = surplus
        if not chosen:
            raise UserError(self._nothing_to_train_on())
        keeps = self.config.keeps_rollouts
        # A surplus group counts as sampled in the step that uses it; if none is kept, it counts now.
        sampled = sorted([*chosen, *self._left_out, *([] if keeps else surplus)], key=lambda group: group.age)
        numbers = {group.number for group in chosen}
        rollouts = Rollouts(
            sampled,
            np.array([group.number in numbers for group in sampled]),
            self.weight_version,
            drops_groups=self.group_filter is not None,
            metrics=rates | self._metrics(chosen),
        )
        if not keeps:
            buffer.waiting, buffer.complete = [], []
        if settings.asynchronous and self.step < self.config.train.steps:
            self._drawn = 0
            self._ask()
        return rollouts

    def _stopped(self) -> list[int]:
        """Stops the engines. Returns the requests with an answer; rollouts of agents may go on at the next step."""
        numbers = list(self.buffer.in_flight)
        with self.phase("rollout"):
            if self.config.keeps_rollouts:
                answered = self.engines.suspend(numbers)
                return [number for number in numbers if number in answered]
            self.engines.abort(numbers)
        return numbers

    def _nothing_to_train_on(self) -> str:
        """A message for a step whose groups were all left out."""
        filtered, drawn = self.settings.group_filter, f"each of {self._drawn} prompts in {self._draws} draws"
        if filtered:
            cause = f"rollout.group_filter ({filtered}) left out the group of {drawn}"
        else:
            cause = (
                f"all responses to a prompt had the same score, for {drawn}: the task is too easy or too hard for this "
                "policy, or the verifier is wrong"
            )
        without = "rollout.group_filter=null" if filtered else "rollout.dynamic_sampling=false"
        return f"step {self.step}: {cause}. Look at the responses with {without} observability.rollouts_every=1"

    def _check_grades(self) -> dict[str, float]:
        return self.grader.check([(group.prompt, reward) for group in self._graded for reward in group.rewards])

    def _metrics(self, chosen: list[Group]) -> dict[str, float]:
        settings = self.settings
        counts = tokens_per_version(chosen) or {self.weight_version: 1}
        mean = sum(version * count for version, count in counts.items()) / sum(counts.values())
        found = {
            "rollout/staleness_max": float(self.weight_version - min(counts)),
            "rollout/staleness_mean": float(self.weight_version - mean),
        }
        if self.group_filter or settings.over_sampling > 1:
            found |= {
                "rollout/draws": float(self._draws),
                "rollout/prompts_drawn": float(self._drawn),
                "rollout/groups_missing": float(settings.prompts_per_step - len(chosen)),
                "rollout/groups_surplus": float(len(self.buffer.complete)),
                "rollout/groups_unfinished": float(len(self.buffer.incomplete)),
            }
        if self.config.keeps_rollouts:
            found["rollout/groups_begun_anew"] = float(self._restarted)
        return found


def _number(group: Group) -> int:
    return group.number
