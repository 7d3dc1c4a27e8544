"""The tokens of one rollout, as they were sampled: one sequence for each conversation that no later call extends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.types import AgentResponse, AgentSequence, FinishReason, Ids, Response


@dataclass(eq=False)
class _Open:
    """A sequence that later calls may extend."""

    context: Ids
    response: Response
    token_ids: Ids
    """Context and response."""

    def begins(self, prompt: Ids) -> bool:
        length = len(self.token_ids)
        return length <= len(prompt) and np.array_equal(prompt[:length], self.token_ids)


class Recording:
    """Every token that the model sampled in a rollout is in exactly one sequence, at its own place and sampled once.

    A call whose prompt begins with all tokens of a sequence extends this sequence: the rest of the prompt is an
    observation, which is not trained. Any other call begins a sequence, with its whole prompt as context.
    """

    def __init__(self) -> None:
        self._sequences: list[_Open] = []
        """The sequences, the one that was extended last at the end."""

    def add(self, prompt: Ids, answer: Response) -> None:
        """Adds the tokens that were sampled after this prompt."""
        if not len(answer):
            return
        fitting = [sequence for sequence in self._sequences if sequence.begins(prompt)]
        if fitting:
            before = max(fitting, key=lambda sequence: len(sequence.token_ids))
            self._sequences.remove(before)
            seen = _observed(prompt[len(before.token_ids) :], answer.weight_version)
            context, response = before.context, before.response.followed_by(seen).followed_by(answer)
        else:
            context, response = prompt, answer
        self._sequences.append(_Open(context, response, np.concatenate([context, response.token_ids])))

    @property
    def num_sampled_tokens(self) -> int:
        return sum(sequence.response.num_sampled_tokens for sequence in self._sequences)

    def response(self, prompt: tuple[int, ...], finish_reason: FinishReason) -> AgentResponse:
        """The recorded rollout. `prompt`: its context if nothing was sampled."""
        nothing = _Open(np.asarray(prompt, np.int32), _observed(np.zeros(0, np.int32), 0), np.zeros(0, np.int32))
        *others, newest = self._sequences or [nothing]
        return AgentResponse(
            **_fields(newest, finish_reason),
            others=tuple(AgentSequence(**_fields(sequence, finish_reason)) for sequence in others),
        )


def _observed(token_ids: Ids, version: int) -> Response:
    """Tokens that the policy was given. They have the version of the answer that follows, which hence begins there."""
    count = len(token_ids)
    return Response(token_ids, np.zeros(count, np.float32), "abort", version, sampled_mask=np.zeros(count, bool))


def _fields(sequence: _Open, finish_reason: FinishReason) -> dict[str, Any]:
    names = ("token_ids", "log_probs", "weight_version", "version_changes", "sampled_mask")
    values = {name: getattr(sequence.response, name) for name in names}
    return values | {"finish_reason": finish_reason, "context": tuple(sequence.context.tolist())}
