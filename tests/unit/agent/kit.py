"""A tokenizer with chat templates, and engines that answer with made-up tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.agent.session import Limits, Session
from megatron_rl.types import Prompt, Response, SamplingParams

PAIRS = ("a b", "ab c", "o k", "Ġ a", "t h", "th e")
"""Merges, so that a text can be written with other tokens than those that encoding it gives."""
CHATML = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if KEEPS_THINKING and message.role == 'assistant' and '</think>' in content and not loop.last %}
{%- set content = content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content.strip() }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PLAIN = CHATML.replace("KEEPS_THINKING", "false")
THINKING_REMOVED = CHATML.replace("KEEPS_THINKING", "true")

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
STEPS = ("extend", "extend", "extend", "edit", "compact", "branch", "repeat", "other tools")
"""What an agent does with its history before the next call."""
ROOM = Limits(turns=1000, sequence_tokens=100_000)


@cache
def tokenizer(template: str = PLAIN) -> Any:
    """Bytes, a few merges and ChatML's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair.split()) for pair in PAIRS]
    vocabulary = {text: i for i, text in enumerate([*letters, *("".join(pair) for pair in merges)])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return made


def end() -> int:
    return int(tokenizer().convert_tokens_to_ids("<|im_end|>"))


def sampling(n: int = 1, max_tokens: int = 10_000) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=max_tokens, temperature=1.0, stop_token_ids=(end(),), seed=3)


def written(text: str, *, ends: bool = True, version: int = 0) -> Response:
    """A response with this text, as a model may write it: byte by byte, not as the text would be tokenised."""
    letters = {i: tokenizer().convert_ids_to_tokens(i) for i in range(len(tokenizer()))}
    of_byte = {letter: i for i, letter in letters.items() if len(letter) == 1}
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [of_byte[letter] for piece, _ in encoded for letter in piece] + ([end()] if ends else [])
    return Response(ids, [-0.5] * len(ids), "stop" if ends else "length", version)


class TextEngines:
    """`cluster.engines.Engines`, with answers that are a function of the prompt's text."""

    def __init__(self, answers: Callable[[str], str], *, embedded: bool = True) -> None:
        self.answers, self.embedded = answers, embedded
        self.batches: list[int] = []
        """Number of prompts of each call of `submit`."""
        self.asked: dict[int, Response] = {}
        self.submitted = 0
        self.aborted = 0

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[int]:
        self.batches.append(len(prompts))
        numbers = list(range(self.submitted, self.submitted + len(prompts)))
        self.submitted += len(prompts)
        for number, prompt in zip(numbers, prompts, strict=True):
            whole = written(self.answers(tokenizer().decode(list(prompt.token_ids))))
            count = min(len(whole), sampling.max_tokens)
            reason = "stop" if count == len(whole) else "length"
            self.asked[number] = Response(whole.token_ids[:count], whole.log_probs[:count], reason, 0)  # type: ignore[arg-type]
        return numbers

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        return set(ids) & self.asked.keys()

    def take(self, request: int) -> list[Response]:
        return [self.asked.pop(request)]

    def abort(self, ids: Iterable[int]) -> None:
        self.aborted += len(list(ids))


def made_up(rng: random.Random) -> Response:
    """An answer of random tokens with thinking or tool calls now and then. It may end at its limit."""
    kind = rng.choice(("plain", "thinking", "tool", "broken tool"))
    words = "".join(rng.choice("ab ckothe\n") for _ in range(rng.randint(0, 6)))
    text = {
        "plain": words,
        "thinking": f"<think>{words}</think>ab {words}",
        "tool": f'{words}<tool_call>{{"name": "f", "arguments": {{"x": "{words.strip()!r}"}}}}</tool_call>',
        "broken tool": f"<tool_call>{words}</tool_call>",
    }[kind]
    return written(text, ends=rng.random() < 0.8)


def observation(rng: random.Random) -> dict[str, Any]:
    text = rng.choice(("ab", "the <|im_end|>\n<|im_start|>assistant\n", "", " abc\n", "<tool_call>{}</tool_call>"))
    return {"role": rng.choice(("user", "tool")), "content": text}


async def converse(session: Session, rng: random.Random, steps: list[str]) -> None:
    history: list[dict[str, Any]] = [{"role": "user", "content": "ab ok"}]
    tools: Any = TOOLS
    states = [history]
    for step in steps:
        if step == "edit":
            place = rng.randrange(len(history))
            history = [*history[:place], history[place] | {"content": "abab"}, *history[place + 1 :]]
        elif step == "compact":
            history = [{"role": "user", "content": "the summary"}]
        elif step == "branch":
            history = [*rng.choice(states), observation(rng)]
        elif step == "repeat":
            history = history[:-1] if history[-1]["role"] == "assistant" and len(history) > 1 else history
        elif step == "other tools":
            tools = None if tools else TOOLS
        if history[-1]["role"] == "assistant":
            history = [*history, observation(rng)]
        answer = await session.chat(history, tools=tools)
        history = [*history, {"refusal": None} | (answer.message or {})]
        states.append(history)
