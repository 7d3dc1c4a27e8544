"""The groups that one step sampled, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_rl.rollout.buffer import Group
from megatron_rl.types import Prompt, Response, RewardResult


@dataclass(eq=False)
class Rollouts:
    """Legend: G groups that were sampled; N sequences of the responses of the groups to train on."""

    sampled: list[Group]
    """G groups with responses and rewards, the oldest first. The index of a group here is its number in the step."""
    trained: npt.NDArray[np.bool_]
    """[G], True for the groups to train on."""
    weight_version: int | None
    """Version of the weights that the step trains; None for replayed rollouts, whose versions belong to another run."""
    drops_groups: bool = False
    """Whether groups without signal were dropped and replaced (dynamic sampling)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """How grading went, and what happened to the prompts."""

    @property
    def groups(self) -> list[Group]:
        """The groups to train on."""
        return [group for group, trained in zip(self.sampled, self.trained, strict=True) if trained]

    @property
    def responses(self) -> list[tuple[Prompt, Response, RewardResult]]:
        """The responses to train on, group after group. A response has one sequence, unless an agent sampled it."""
        return list(graded_responses(self.groups))

    @property
    def sequences(self) -> list[tuple[int, Prompt, Response, RewardResult]]:
        """The N sequences, each with the number of its response in the group, and with its own context as the
        prompt."""
        return [
            (
                number,
                replace(group.prompt, token_ids=tuple(sequence.context_of(group.prompt.token_ids))),
                sequence,
                reward,
            )
            for group in self.groups
            for number, (response, reward) in enumerate(zip(group.responses, group.rewards, strict=True))
            for sequence in response.sequences
        ]

    @property
    def group_numbers(self) -> npt.NDArray[np.int64]:
        """[N], index in `sampled` of the group that each sequence belongs to."""
        sizes = [sum(len(response.sequences) for response in group.responses) for group in self.groups]
        return np.repeat(np.flatnonzero(self.trained), np.array(sizes, dtype=np.int64))

    def signal_fraction(self, advantages: npt.NDArray[Any]) -> float:
        """Share of the sampled groups that have an advantage [N] other than 0, or would have had one if trained on."""
        with_signal = set(self.group_numbers[advantages != 0].tolist())
        if self.drops_groups:
            with_signal |= {number for number, group in enumerate(self.sampled) if group.has_signal}
        return len(with_signal) / max(1, len(self.sampled))


class RolloutSource(Protocol):
    """Provides each step's rollouts: engines that sample them, or the recording of another run."""

    def collect(self, step: int, weight_version: int) -> Rollouts:
        """Returns the rollouts of a step that trains weights of this version."""
        ...

    @property
    def pending(self) -> list[Group]:
        """The groups that the steps so far leave to later ones; a checkpoint holds them."""
        ...


def graded_responses(groups: Iterable[Group]) -> Iterable[tuple[Prompt, Response, RewardResult]]:
    """Yields every response of the groups with its prompt and reward."""
    for group in groups:
        for response, reward in zip(group.responses, group.rewards, strict=True):
            yield group.prompt, response, reward


def tokens_per_version(groups: Sequence[Group]) -> dict[int, int]:
    """Weight version -> number of tokens that it sampled."""
    counts: dict[int, int] = {}
    for group in groups:
        for sequence in (sequence for response in group.responses for sequence in response.sequences):
            for start, end, version in sequence.version_runs:
                count = int(np.count_nonzero(sequence.sampled_mask[start:end]))
                counts[version] = counts.get(version, 0) + count
    return {version: count for version, count in counts.items() if count}
