"""Groups between drawing a prompt and training on its responses: what one step leaves to the next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megatron_rl.types import Prompt, Response, RewardResult


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its responses and their rewards. A group owns its responses from sampling to record."""

    number: int
    """Number of prompts that the run drew before this one."""
    row: int
    """Index of the prompt in the training data."""
    prompt: Prompt
    since: int
    """Weight version in training when the group was started."""
    responses: tuple[Response, ...] = ()
    """Empty, or as many as a group has. A partial response has the finish reason "abort"."""
    rewards: tuple[RewardResult, ...] = ()
    """One per response, once they are graded."""

    @property
    def complete(self) -> bool:
        return bool(self.responses) and all(response.finish_reason != "abort" for response in self.responses)

    @property
    def scores(self) -> list[float]:
        """Scores of the responses that have one."""
        return [reward.score for reward in self.rewards if reward.has_score]

    @property
    def has_signal(self) -> bool:
        """Whether the verifier's scores differ, so that a group-relative advantage can tell the responses apart."""
        return len(set(self.scores)) > 1

    @property
    def oldest_version(self) -> int:
        """Oldest version of the weights that sampled the group's tokens; `since` if there are no tokens yet."""
        sequences = (sequence for response in self.responses for sequence in response.sequences)
        return min((sequence.weight_version for sequence in sequences if len(sequence)), default=self.since)

    @property
    def age(self) -> tuple[int, int]:
        """Sort key: the oldest group sorts first."""
        return self.oldest_version, self.number

    def answered(self, responses: Iterable[Response]) -> Group:
        """Returns the group with an engine's answer. Aborted responses without any token do not count as started."""
        responses = tuple(responses)
        started = any(len(response) or response.finish_reason != "abort" for response in responses)
        return replace(self, responses=responses if started else ())

    def restarted(self, version: int) -> Group:
        """Returns the group without responses, to be sampled again by weights of this version."""
        return replace(self, since=version, responses=(), rewards=())


@dataclass
class RolloutBuffer:
    """Holds every prompt that was drawn and neither trained on nor left out, in one of three places."""

    waiting: list[Group] = field(default_factory=list)
    """Incomplete groups that no engine is working on."""
    in_flight: dict[int, Group] = field(default_factory=dict)
    """Request number -> group, with the responses that it had when the rest was requested from the engines."""
    complete: list[Group] = field(default_factory=list)
    """Graded groups that are worth training on."""

    @classmethod
    def of(cls, groups: Iterable[Group]) -> RolloutBuffer:
        """Returns a buffer with the groups of a checkpoint, of which none is in flight."""
        buffer = cls()
        for group in groups:
            buffer.put(group)
        return buffer

    def put(self, group: Group) -> None:
        (self.complete if group.complete else self.waiting).append(group)

    @property
    def groups(self) -> list[Group]:
        """All groups in the order in which their prompts were drawn, without unfinished work of the engines."""
        return sorted([*self.waiting, *self.in_flight.values(), *self.complete], key=lambda group: group.number)

    @property
    def incomplete(self) -> list[Group]:
        return [*self.waiting, *self.in_flight.values()]
