"""What travels between the rooms: prompts, samples, rewards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort"]
Outcome = Literal["score", "timeout", "error"]
"""What became of grading a sample: a score, or none because the verifier took too long or failed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready for an engine."""

    id: str
    """Unique in its data set: `<file stem>:<row>`."""
    token_ids: tuple[int, ...]
    text: str
    label: Any
    """Ground truth for the verifier, as the row gave it; None for prompt-only data."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, for custom verifiers."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an engine samples. Never truncated by top-p or top-k: log-probs must be those of the policy."""

    n: int
    """Responses per prompt."""
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    seed: int

    def reseeded(self, stream: int) -> SamplingParams:
        """The same sampling from another stream of random numbers."""
        return replace(self, seed=(self.seed * 1_000_003 + stream) % 2**63)  # what a generator takes

    def remaining(self, done: int) -> SamplingParams:
        """For the rest of one response of which `done` tokens are there."""
        return replace(self, n=1, max_tokens=self.max_tokens - done)


@dataclass(frozen=True, slots=True)
class Generation:
    """One response as an engine gives it: token ids in, token ids out."""

    token_ids: list[int]
    """Response only, the stop token included."""
    log_probs: list[float]
    """Of each response token, at the sampling temperature."""
    finish_reason: FinishReason
    weight_version: int
    """Of the weights that sampled the first token: the oldest."""
    version_changes: tuple[tuple[int, int], ...] = ()
    """(position, version) of each token from which on newer weights sampled, in order."""

    @property
    def weight_versions(self) -> list[int]:
        """Of each response token."""
        starts = [(0, self.weight_version), *self.version_changes]
        ends = [start for start, _ in self.version_changes] + [len(self.token_ids)]
        return [version for (start, version), end in zip(starts, ends, strict=True) for _ in range(start, end)]

    def followed_by(self, rest: Generation) -> Generation:
        """This unfinished response, gone on with: `rest` was sampled after it, by the same or newer weights."""
        versions = self.weight_versions + rest.weight_versions
        pairs = enumerate(pairwise(versions), start=1)
        return Generation(
            token_ids=self.token_ids + rest.token_ids,
            log_probs=self.log_probs + rest.log_probs,
            finish_reason=rest.finish_reason,
            weight_version=versions[0] if versions else rest.weight_version,
            version_changes=tuple((place, version) for place, (before, version) in pairs if version != before),
        )


@dataclass(frozen=True, slots=True)
class RewardResult:
    score: float
    answer: str | None = None
    """What the verifier took as the answer."""
    detail: str = ""
    """Why the score is what it is: "correct", "no box", "KeyError: ..."."""
    outcome: Outcome = "score"
    """Without a score, `score` is 0."""


@dataclass(slots=True)
class Sample:
    """A prompt with one response, on its way through reward, advantage and batch."""

    prompt: Prompt
    group: int
    """Which prompt of the step it belongs to; advantages are relative within a group."""
    generation: Generation
    text: str
    """The response decoded without special tokens."""
    reward: RewardResult | None = None


class Reward(Protocol):
    """A verifier: a pure function of one sample."""

    def __call__(self, sample: Sample) -> RewardResult: ...
