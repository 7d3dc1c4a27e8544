"""Groups between a prompt that was drawn and the step that trains on it: what a step leaves to the next one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megatron_rl.types import Generation, RewardResult


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with what there is of its responses."""

    number: int
    """Prompts that the run drew before this one."""
    row: int
    """Of the training prompts."""
    since: int
    """Weight version that was in training when it was begun."""
    responses: tuple[Generation, ...] = ()
    """None, or as many as a group has. An unfinished one has the finish reason abort."""
    rewards: tuple[RewardResult, ...] = ()
    """One a response, once they are graded."""

    @property
    def whole(self) -> bool:
        return bool(self.responses) and all(response.finish_reason != "abort" for response in self.responses)

    @property
    def informative(self) -> bool:
        """Whether the verifier's scores differ."""
        return len({reward.score for reward in self.rewards}) > 1

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled its tokens, or will have."""
        return min((r.weight_version for r in self.responses if r.token_ids), default=self.since)

    @property
    def age(self) -> tuple[int, int]:
        """The oldest sorts first."""
        return self.oldest_version, self.number

    def answered(self, responses: Iterable[Generation]) -> Group:
        """With what an engine gave; unfinished responses without any token are no responses yet."""
        responses = tuple(responses)
        begun = any(response.token_ids or response.finish_reason != "abort" for response in responses)
        return replace(self, responses=responses if begun else ())

    def begun_anew(self, version: int) -> Group:
        return replace(self, since=version, responses=(), rewards=())


@dataclass
class RolloutBuffer:
    """Every prompt that was drawn, and neither trained on nor left out, is in one of the three."""

    waiting: list[Group] = field(default_factory=list)
    """Not whole; no engine is at work on them."""
    under_way: dict[int, Group] = field(default_factory=dict)
    """Not whole: as they were when engines were asked for the rest. By the number of the request."""
    whole: list[Group] = field(default_factory=list)
    """Graded, and worth training on."""

    @classmethod
    def of(cls, groups: Iterable[Group]) -> RolloutBuffer:
        """As a checkpoint has it: nothing is under way."""
        buffer = cls()
        for group in groups:
            buffer.put(group)
        return buffer

    def put(self, group: Group) -> None:
        (self.whole if group.whole else self.waiting).append(group)

    @property
    def groups(self) -> list[Group]:
        """All, in the order in which their prompts were drawn; without what engines have done of those under way."""
        return sorted([*self.waiting, *self.under_way.values(), *self.whole], key=lambda group: group.number)

    @property
    def unfinished(self) -> list[Group]:
        return [*self.waiting, *self.under_way.values()]
