"""Conversations as token ids: a history is continued from the ids that were sampled, and never tokenised again."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rl.agent.messages import BadRequest, Message, for_template, key_of, well_formed
from megatron_rl.agent.tool_calls import SPELLED, answer_of, form_of
from megatron_rl.types import Ids, Response

CHARACTERS_PER_TOKEN = 32
"""A conversation that has more characters for each token of the engine's context certainly does not fit, and is not
tokenised, which would keep all rollouts waiting. Ordinary texts have 2 to 5 characters per token."""
Decode = Callable[[Sequence[int]], str]


class TooLong(Exception):
    """A conversation that does not fit into the engine's context."""


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A conversation up to one answer of the model."""

    keys: list[str]
    """`key_of` each message, the answer included."""
    tools: Any
    prompt: str
    """The rendered conversation before the answer."""
    answer: Message
    end: str
    """Text of the stop token that ended the answer; "" if none did."""
    token_ids: Ids


class Conversation:
    """The chat turns of one rollout, in any order: a history may branch from any of them."""

    def __init__(self, tokenizer: Any, sequence_tokens: int) -> None:
        """`tokenizer`: a Hugging Face tokenizer with a chat template. `sequence_tokens`: the engine's context."""
        self._most_characters = sequence_tokens * CHARACTERS_PER_TOKEN
        self._tokenizer = tokenizer
        self._turns: list[_Turn] = []
        self._special = _pattern_of_special_tokens(tokenizer)
        self._form = form_of(str(tokenizer.chat_template))
        self._cut, self._placeholder = (f"{name}{secrets.token_hex(8)}" for name in ("cut", "answer"))
        """Two texts that no message has by chance. One stands between the parts of a text that are tokenised apart, the
        other for an answer, to find what a template writes after it."""

    def prompt(self, messages: list[Message], tools: Any) -> Ids:
        """Returns the ids that the model continues: those of the longest known conversation that the messages extend,
        and what the template adds to it. Messages that extend none are rendered and tokenised as a whole.

        A template that shows an earlier answer differently now, such as without its thinking, makes another
        conversation. Raises BadRequest if the template refuses the messages, and TooLong if they cannot fit.
        """
        text = self._render(messages, tools)
        if len(text) > self._most_characters:
            raise TooLong(
                f"the conversation has {len(text)} characters, more than {CHARACTERS_PER_TOKEN} for each token that a "
                "sequence may have (data.max_prompt_tokens + rollout.max_response_tokens)"
            )
        keys = [key_of(message) for message in messages]
        for turn in sorted(reversed(self._turns), key=lambda turn: -len(turn.keys)):
            count = len(turn.keys)
            if count < len(keys) and keys[:count] == turn.keys and turn.tools == tools:
                added = self._added(turn, messages, tools, text)
                if added is not None:
                    return np.concatenate([turn.token_ids, self._encode(added)])
        return self._encode(text)

    @property
    def needs_special_tokens(self) -> bool:
        """Whether special tokens say what an answer is: a call of a tool, or thinking."""
        return self._form in SPELLED

    def answered(
        self, messages: list[Message], tools: Any, prompt: Ids, answer: Response, text: str, spelled: str = ""
    ) -> Message:
        """Notes the answer to the messages, and returns it as a message. `text`: of the answer; `spelled`: the same
        with its special tokens, if they are needed."""
        last = answer.token_ids[-1:].tolist() if answer.finish_reason == "stop" else []
        end = str(self._tokenizer.decode(last, skip_special_tokens=False))
        message = answer_of(text, with_tools=bool(tools), form=self._form, spelled=spelled.removesuffix(end))
        self._turns.append(
            _Turn(
                keys=[key_of(known) for known in (*messages, message)],
                tools=tools,
                prompt=self._render(messages, tools),
                answer=message,
                end=end,
                token_ids=np.concatenate([prompt, answer.token_ids]),
            )
        )
        return message

    def _added(self, turn: _Turn, messages: list[Message], tools: Any, text: str) -> str | None:
        """Returns the text that the template adds after the turn's answer; None if it shows what came before in another
        way than the model saw it. Some templates want the results of tools to follow a call."""
        answers: list[Message] = [{"role": "assistant", "content": self._placeholder}]
        if turn.end and (calls := turn.answer.get("tool_calls")):
            function = calls[-1]["function"] | {"arguments": self._placeholder}
            answers.append(
                turn.answer | {"content": "", "tool_calls": [*calls[:-1], calls[-1] | {"function": function}]}
            )
        for answer in answers:
            after = self._after(turn, answer, messages, tools, text)
            if after is not None:
                return after
        return None

    def _after(self, turn: _Turn, answer: Message, messages: list[Message], tools: Any, text: str) -> str | None:
        """`answer`: takes the place of the turn's answer, and has the placeholder. The text of the whole conversation
        must be what the model saw, its answer, and what follows the placeholder."""
        place = len(turn.keys) - 1
        try:
            marked = self._render([*messages[:place], answer, *messages[place + 1 :]], tools)
        except BadRequest:
            return None
        before, found, after = marked.rpartition(self._placeholder)
        if "tool_calls" in answer:  # the template closes the call before it ends the message
            _, ends, after = after.partition(turn.end)
            found, after = found and ends, ends + after
        shown = text.removeprefix(turn.prompt).removesuffix(after)
        if not found or not before.startswith(turn.prompt) or len(shown) + len(turn.prompt) + len(after) != len(text):
            return None
        for part in ("content", "reasoning_content"):
            if _squeezed(self._as_text(turn.answer.get(part, ""))) not in _squeezed(shown):  # thinking was removed
                return None
        return after.removeprefix(turn.end)

    def _render(self, messages: list[Message], tools: Any) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [self._as_text(for_template(message)) for message in messages],
                    tools=self._as_text(tools) or None,
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template is a program of the model's folder and may raise anything
            raise BadRequest(f"the chat template refuses these messages: {type(error).__name__}: {error}") from error

    def _encode(self, text: str) -> Ids:
        if well_formed(text) != text:
            raise BadRequest("the messages or tools have a lone surrogate (half of a character), which no token has")
        try:
            parts = [self._tokenizer.encode(part, add_special_tokens=False) for part in text.split(self._cut)]
        except Exception as error:  # a tokenizer of whole words raises a plain Exception for an unknown one
            raise BadRequest(f"the tokenizer cannot encode these messages: {error}") from error
        return np.asarray([token for part in parts for token in part], dtype=np.int32)

    def _as_text(self, value: Any) -> Any:
        """Returns a message, tools, or a part of them, with every special token in their texts cut in two, so that it
        is tokenised as text: only the template itself may end a message or begin another."""
        if isinstance(value, str):
            return self._special.sub(lambda found: found[0][0] + self._cut + found[0][1:], value)
        if isinstance(value, dict):
            return {self._as_text(key): self._as_text(part) for key, part in value.items()}
        return [self._as_text(part) for part in value] if isinstance(value, list) else value


def _pattern_of_special_tokens(tokenizer: Any) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens if len(token) > 1) or r"(?!)")


def _squeezed(text: str) -> str:
    """The text without white space, which templates add and remove."""
    return "".join(text.split())
