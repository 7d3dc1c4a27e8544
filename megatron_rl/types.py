"""What travels between the rooms: prompts, samples, rewards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, slots=True)
class Generation:
    """One response as an engine gives it: token ids in, token ids out."""

    token_ids: list[int]
    """Response only, the stop token included."""
    log_probs: list[float]
    """Of each response token, at the sampling temperature."""
    finish_reason: FinishReason
    weight_version: int


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
