"""A session: the model as one rollout sees it, with the rollout's limits and a recording of every token."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_rl.agent.conversation import Conversation, TooLong
from megatron_rl.agent.messages import BadRequest, Message, normalised, well_formed
from megatron_rl.agent.recording import Recording
from megatron_rl.types import AgentResponse, GradedText, Ids, Response, RewardResult, SamplingParams

Sample = Callable[[Ids, SamplingParams], Awaitable[Response]]
"""Asks the engines for one response to a prompt."""


REFUSED_SECONDS = 0.05
LIMIT_CODE = "context_length_exceeded"
"""OpenAI's code of the error that clients get in the place of LimitReached."""


class LimitReached(Exception):
    """The rollout may not call the model again. It ends as a truncated response, unless the agent returns a reward."""


class SessionClosed(Exception):
    """The rollout has ended, and the model does not answer it any more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of every rollout. `SamplingParams.max_tokens` limits its sampled tokens."""

    turns: int
    sequence_tokens: int
    """Most tokens that the engine can hold: context and response."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the model wrote in one call."""

    response: Response
    text: str
    """The text before a stop text, without special tokens."""
    prompt_tokens: int
    message: Message | None = None
    """The answer as a chat message, if it was a chat."""


class Session:
    """One rollout's access to the model. All methods run on one event loop."""

    def __init__(self, tokenizer: Any, sample: Sample, sampling: SamplingParams, limits: Limits) -> None:
        self.id, self.key = secrets.token_hex(8), secrets.token_urlsafe(24)
        self.tokenizer = tokenizer
        self.recording, self.limit_reached = Recording(), False
        self.closed = False
        self.tool_calls = self.tool_errors = 0
        """Calls of tools in this rollout, and how many of their results are errors. Results of tools that a client of
        the server runs itself are not looked at."""
        self._conversation = Conversation(tokenizer, limits.sequence_tokens)
        self._sample, self._sampling, self._limits = sample, sampling, limits
        self._turns, self._truncated = 0, False
        self._vocabulary = len(tokenizer)
        """Token ids are below this number. A model may sample ids that its tokenizer does not have."""

    async def chat(self, messages: Any, *, tools: Any = None, max_tokens: int | None = None, stop: Any = ()) -> Answer:
        """Answers messages of the OpenAI chat format. Raises BadRequest, LimitReached or SessionClosed."""
        return await _unhurried(self._chat(messages, tools, max_tokens, stop))

    async def _chat(self, messages: Any, tools: Any, max_tokens: int | None, stop: Any) -> Answer:
        if not self.tokenizer.chat_template:
            raise BadRequest(
                "the model's tokenizer has no chat template: use `model.generate`, or another model folder"
            )
        known = normalised(messages)
        try:
            prompt = self._conversation.prompt(known, tools)
        except TooLong as error:
            raise self.limit(str(error)) from error
        answer = await self._answer(prompt, max_tokens, stop)
        whole = (
            self._text(answer.response, _stop_texts(stop), special=True)
            if self._conversation.needs_special_tokens
            else ""
        )
        message = self._conversation.answered(known, tools, prompt, answer.response, answer.text, whole)
        self.tool_calls += len(message.get("tool_calls", ()))
        return replace(answer, message=message)

    def tool_result(self, result: str) -> str:
        """Counts an error in the result of a tool, and returns the result. An error begins with `error:`."""
        self.tool_errors += result.startswith("error:")
        return result

    async def generate(self, prompt: Any, *, max_tokens: int | None = None, stop: Any = ()) -> Answer:
        """Continues token ids. `stop`: a text or texts that end the answer; their tokens are kept as they were sampled.

        Raises ValueError for what are no tokens of the vocabulary, BadRequest, LimitReached or SessionClosed.
        """
        return await _unhurried(self._generate(prompt, max_tokens, stop))

    async def _generate(self, prompt: Any, max_tokens: int | None, stop: Any) -> Answer:
        return await self._answer(_token_ids(prompt, self._vocabulary), max_tokens, stop)

    async def _answer(self, ids: Ids, max_tokens: int | None, stop: Any) -> Answer:
        stop = _stop_texts(stop)
        sampling = self._next(len(ids), max_tokens, stop)
        response = await self._sample(ids, sampling)
        if self.closed:
            raise SessionClosed("the rollout has ended")
        if stop:
            response = self._cut(response, stop)
        response = self._within_limit(response)
        self._vocabulary = max(self._vocabulary, int(response.token_ids.max(initial=0)) + 1)
        self.recording.add(ids, response)
        self._truncated = response.finish_reason == "length"
        return Answer(response, self._text(response, stop), len(ids))

    def _text(self, response: Response, stop: Sequence[str], *, special: bool = False) -> str:
        """The text before a stop text. `special`: with special tokens."""
        text = str(self.tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=not special))
        return text[: _place(text, stop)]

    def _next(self, prompt_tokens: int, max_tokens: int | None, stop: Sequence[str]) -> SamplingParams:
        """The parameters of the next call."""
        if self.closed:
            raise SessionClosed("the rollout has ended")
        if max_tokens is not None and max_tokens < 1:
            raise BadRequest(f"max_tokens: {max_tokens} is less than 1")
        unsampled = self._sampling.max_tokens - self.recording.num_sampled_tokens
        left = min(unsampled, self._limits.sequence_tokens - prompt_tokens)
        if self._turns >= self._limits.turns or left < 1:
            raise self.limit(
                f"the rollout has had {self._turns} of {self._limits.turns} turns (rollout.agent.max_turns), may "
                f"sample {max(unsampled, 0)} more tokens (rollout.max_response_tokens), and asks for an answer after "
                f"{prompt_tokens} tokens, of {self._limits.sequence_tokens} that a sequence may have "
                "(data.max_prompt_tokens + rollout.max_response_tokens)"
            )
        ends = tuple(self._single_tokens(stop))
        self._turns += 1
        return replace(
            self._sampling.reseeded(self._turns),
            n=1,
            max_tokens=min(left, max_tokens or left),
            stop_token_ids=(*self._sampling.stop_token_ids, *ends),
        )

    def limit(self, message: str) -> LimitReached:
        """Notes that the rollout has reached a limit, and returns the error to raise."""
        self.limit_reached = True
        return LimitReached(message)

    def _within_limit(self, response: Response) -> Response:
        """Returns the response up to the limit of the rollout's sampled tokens, which calls at the same time share."""
        left = self._sampling.max_tokens - self.recording.num_sampled_tokens
        if len(response) <= left:
            return response
        if left < 1:
            raise self.limit(
                f"calls at the same time have sampled all {self._sampling.max_tokens} tokens of the rollout "
                "(rollout.max_response_tokens)"
            )
        return first_tokens(response, left, "length")

    def _single_tokens(self, stop: Sequence[str]) -> list[int]:
        """Stop texts that are tokens end the sampling in the engine; others are found in its answer."""
        try:
            encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in stop]
        except Exception as error:  # a tokenizer of whole words raises a plain Exception for an unknown one
            raise BadRequest(f"stop: the tokenizer cannot encode a text: {error}") from error
        return sorted({ids[0] for ids in encoded if len(ids) == 1})

    def _cut(self, response: Response, stop: Sequence[str]) -> Response:
        """Returns the response up to the token that completes a stop text. A prefix of a sample is itself a sample."""
        ids = response.token_ids.tolist()
        if _place(self.tokenizer.decode(ids, skip_special_tokens=True), stop) is None:
            return response
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            found = _place(self.tokenizer.decode(ids[:middle], skip_special_tokens=True), stop) is not None
            low, high = (low, middle) if found else (middle + 1, high)
        return first_tokens(response, low, "stop")

    def recorded(
        self, prompt: tuple[int, ...], reward: RewardResult | None, graded: GradedText = "answer"
    ) -> AgentResponse:
        """Returns the rollout, with its graded text in the reward. The rollout is truncated if its last answer is, or
        if it has reached a limit and has no reward."""
        truncated = self._truncated or (self.limit_reached and reward is None)
        response = replace(
            self.recording.response(prompt, "length" if truncated else "stop"),
            tool_calls=self.tool_calls,
            tool_errors=self.tool_errors,
            graded=graded,
        )
        if reward is not None and not reward.text:
            ids = response.graded_token_ids.tolist()
            reward = replace(reward, text=str(self.tokenizer.decode(ids, skip_special_tokens=True)))
        return replace(response, reward=reward)


async def _unhurried(call: Awaitable[Answer]) -> Answer:
    """Returns the answer. A call that is refused takes a moment: an agent that makes it again and again leaves the
    event loop to others until its time is over."""
    try:
        return await call
    except Exception as error:
        await asyncio.sleep(0.0 if isinstance(error, SessionClosed) else REFUSED_SECONDS)
        raise


def first_tokens(response: Response, count: int, reason: Any) -> Response:
    """Returns the first `count` tokens of a response, with this finish reason."""
    return Response(
        response.token_ids[:count],
        response.log_probs[:count],
        reason,
        response.weight_version,
        tuple(change for change in response.version_changes if change[0] < count),
        response.sampled_mask[:count],
    )


def _token_ids(prompt: Any, vocabulary: int) -> Ids:
    """Returns the prompt as an array. Raises ValueError if anything in it is no number below `vocabulary`."""
    if not isinstance(prompt, np.ndarray):
        prompt = list(prompt)
        for token in prompt:
            if isinstance(token, bool | str | bytes) or not hasattr(token, "__index__"):
                raise ValueError(f"token {token!r} is not a whole number: a prompt is a list of token ids")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not len(ids):
        raise ValueError("the prompt must be a list with at least one token")
    if ids.dtype.kind not in "iuO":
        raise ValueError(f"token {ids[0]!r} is not a whole number: a prompt is a list of token ids")
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise ValueError(f"token {wrong[0]} is not in the vocabulary of {vocabulary} tokens")
    return ids.astype(np.int32)


def _stop_texts(stop: Any) -> tuple[str, ...]:
    """Returns the stop texts as a tuple. Raises BadRequest for anything but a text or several."""
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
        raise BadRequest(f"stop: {stop!r}, but a text or a list of texts is expected, none of them empty")
    if any(well_formed(text) != text for text in stops):
        raise BadRequest("stop: a text has a lone surrogate, which no token has")
    return tuple(stops)


def _place(text: str, stop: Sequence[str]) -> int | None:
    """Place of the first stop text; None if there is none."""
    found = [place for place in map(text.find, stop) if place >= 0]
    return min(found, default=None)
