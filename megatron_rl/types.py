"""What travels between the rooms: prompts, responses, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort"]
GradedText = Literal["answer", "transcript"]
"""The text of an agent's rollout that is graded: what the policy sampled in its last turn, or its whole newest
sequence, with what tools returned."""
Outcome = Literal["score", "timeout", "error"]
"""Result of grading a sample: "score", or the reason why there is none: the verifier took too long or failed."""


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
    """How an engine samples. Top-p and top-k are never used: log-probs must be those of the policy itself."""

    n: int
    """Responses per prompt."""
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    seed: int

    def reseeded(self, stream: int) -> SamplingParams:
        """Returns the same parameters with another stream of random numbers."""
        return replace(self, seed=(self.seed * 1_000_003 + stream) % 2**63)  # the range that a generator accepts

    def remaining(self, done: int) -> SamplingParams:
        """Returns the parameters for the rest of one response that already has `done` tokens."""
        return replace(self, n=1, max_tokens=self.max_tokens - done)


Ids = npt.NDArray[np.int32]
"""Token ids."""


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One response to a prompt, as arrays. The constructor also accepts lists.

    A response usually holds sampled tokens only. A multi-turn response also holds tokens that were given to the policy,
    such as the output of a tool; `sampled_mask` is False there.

    Raises:
        ValueError: the arrays differ in length.
    """

    token_ids: Ids
    """int32 [n], without the prompt, including the stop token."""
    log_probs: npt.NDArray[np.float32]
    """float32 [n], log-prob of each sampled token at the sampling temperature; 0 for a token that was not sampled.
    Empty if the source reports none."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that sampled the first token, which is the oldest version of the response."""
    version_changes: tuple[tuple[int, int], ...] = ()
    """(position, version) of each token at which newer weights took over, in order."""
    sampled_mask: npt.NDArray[np.bool_] = None  # type: ignore[assignment]
    """bool [n], True for tokens that the policy sampled. Default: all of them."""

    def __post_init__(self) -> None:
        token_ids = np.asarray(self.token_ids, dtype=np.int32)
        mask = np.ones(len(token_ids), bool) if self.sampled_mask is None else np.asarray(self.sampled_mask, dtype=bool)
        log_probs = np.asarray(self.log_probs, dtype=np.float32)
        if len(mask) != len(token_ids) or len(log_probs) not in (0, len(token_ids)):
            raise ValueError(f"{len(token_ids)} tokens, {len(log_probs)} log-probs and {len(mask)} mask values")
        for name, value in (("token_ids", token_ids), ("log_probs", log_probs), ("sampled_mask", mask)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of tokens, whether sampled or not."""
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Response):
            return NotImplemented
        same = (self.finish_reason, self.weight_version, self.version_changes) == (
            other.finish_reason,
            other.weight_version,
            other.version_changes,
        )
        arrays = (
            (self.token_ids, other.token_ids),
            (self.log_probs, other.log_probs),
            (self.sampled_mask, other.sampled_mask),
        )
        return same and all(np.array_equal(mine, others) for mine, others in arrays)

    __hash__ = None  # type: ignore[assignment]

    @property
    def sequences(self) -> tuple[Response, ...]:
        """The sequences to train on, each with its own mask: the response itself, unless an agent sampled several."""
        return (self,)

    @property
    def graded_token_ids(self) -> Ids:
        """The tokens whose text is graded: all of them, unless an agent sampled the response."""
        return self.token_ids

    def context_of(self, prompt: Sequence[int]) -> Sequence[int]:
        """Token ids before the response: those of the prompt, unless an agent chose others."""
        return prompt

    @property
    def num_sampled_tokens(self) -> int:
        """Number of sampled tokens of all sequences."""
        return int(np.count_nonzero(self.sampled_mask))

    def sampled(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[n] -> the values of the sampled tokens; no copy if all tokens are sampled."""
        return values if self.sampled_mask.all() else values[self.sampled_mask]

    def sampled_by(self, version: int | None) -> npt.NDArray[np.bool_]:
        """bool [n], True for tokens with this weight version."""
        found = np.zeros(len(self), dtype=bool)
        for start, end, own in self.version_runs:
            found[start:end] = own == version
        return found

    @property
    def version_runs(self) -> list[tuple[int, int, int]]:
        """(start, end, version) of each run of tokens with one weight version."""
        starts = [(0, self.weight_version), *self.version_changes]
        ends = [start for start, _ in self.version_changes] + [len(self)]
        return [(start, end, version) for (start, version), end in zip(starts, ends, strict=True)]

    @property
    def weight_versions(self) -> npt.NDArray[np.int64]:
        """[n], weight version of each token."""
        versions = np.empty(len(self), dtype=np.int64)
        for start, end, version in self.version_runs:
            versions[start:end] = version
        return versions

    def followed_by(self, rest: Response) -> Response:
        """Returns this unfinished response continued by `rest`, which the same or newer weights sampled. The result
        has no log-probs if one of the two has tokens without log-probs."""
        shifted = [(len(self) + start, len(self) + end, version) for start, end, version in rest.version_runs]
        runs = [run for run in [*self.version_runs, *shifted] if run[0] < run[1]]
        changes = [(after[0], after[2]) for before, after in pairwise(runs) if before[2] != after[2]]
        known = all(len(part.log_probs) == len(part) for part in (self, rest))
        return Response(
            token_ids=np.concatenate([self.token_ids, rest.token_ids]),
            log_probs=np.concatenate([self.log_probs, rest.log_probs] if known else [np.zeros(0, np.float32)]),
            finish_reason=rest.finish_reason,
            weight_version=runs[0][2] if runs else rest.weight_version,
            version_changes=tuple(changes),
            sampled_mask=np.concatenate([self.sampled_mask, rest.sampled_mask]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class AgentSequence(Response):
    """One sequence of an agent's rollout."""

    context: tuple[int, ...] = ()
    """Token ids before the first sampled token, such as a conversation that the chat template renders."""

    def context_of(self, prompt: Sequence[int]) -> Sequence[int]:
        return self.context


@dataclass(frozen=True, slots=True, eq=False)
class AgentResponse(AgentSequence):
    """An agent's rollout: one or several sequences with one reward. As a response it is the newest sequence."""

    others: tuple[AgentSequence, ...] = ()
    """The older sequences: conversations that the newest one does not extend."""
    reward: RewardResult | None = None
    """The agent's own reward, or the reason why there is none; None: the verifier grades the rollout."""
    tool_calls: int = 0
    tool_errors: int = 0
    """Calls of tools whose result is an error."""
    graded: GradedText = "answer"

    @property
    def graded_token_ids(self) -> Ids:
        """Those of the last turn, or also what the policy was given: see `rollout.agent.graded`."""
        if self.graded == "transcript":
            return self.token_ids
        given = np.flatnonzero(~self.sampled_mask)
        return self.token_ids[given[-1] + 1 if len(given) else 0 :]

    @property
    def turns(self) -> int:
        """Number of runs of sampled tokens, in all sequences."""
        masks = [np.append(False, sequence.sampled_mask) for sequence in self.sequences]
        return sum(int(np.count_nonzero(mask[1:] & ~mask[:-1])) for mask in masks)

    @property
    def sequences(self) -> tuple[Response, ...]:
        return (*self.others, self)

    @property
    def num_sampled_tokens(self) -> int:
        return sum(int(np.count_nonzero(sequence.sampled_mask)) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class RewardResult:
    """A verifier's verdict on one sample."""

    score: float
    answer: str | None = None
    """The part of the response that the verifier took as the answer."""
    detail: str = ""
    """Reason for the score: "correct", "no box", "KeyError: ..."."""
    outcome: Outcome = "score"
    """If it is not "score", the sample has no reward, and `score` means nothing."""
    text: str = ""
    """The response as text, without special tokens. The grader fills it in; a verifier need not."""

    @property
    def has_score(self) -> bool:
        return self.outcome == "score"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with one response: the argument of a verifier."""

    prompt: Prompt
    response: Response
    text: str = ""
    """The response decoded without special tokens. The grader fills it in before the verifier sees the sample."""

    @property
    def generation(self) -> Response:
        """Former name of `response`, for verifiers that still use it."""
        return self.response


class Reward(Protocol):
    """A verifier: a pure function of one sample. `reward/results.py` says what it may return."""

    def __call__(self, sample: Sample) -> Any: ...


class Decode(Protocol):
    """Turns token ids into text, without special tokens."""

    def __call__(self, token_ids: Sequence[int] | Ids) -> str: ...
