"""A tokenizer with chat templates, and engines that answer with made-up tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.agent.messages import BadRequest
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
END = "<|im_end|>"
SPECIAL = (
    *(END, "<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *(
        "<|python_tag|>",
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|call|>",
        "<|end|>",
        "<|return|>",
    ),
    *("</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    *("[TOOL_RESULTS]", "[TOOL_CONTENT]", "[/TOOL_RESULTS]"),
)

TOOLS = [{"type": "function", "function": {"name": "f", "description": "ab", "parameters": {}}}]
STEPS = ("extend", "extend", "extend", "edit", "compact", "branch", "repeat", "other tools")
"""What an agent does with its history before the next call."""
ROOM = Limits(turns=1000, sequence_tokens=100_000)


@cache
def tokenizer(template: str = PLAIN, end: str = END) -> Any:
    """Bytes, a few merges, and the special tokens of several families. The template and the end token do not change
    the ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair.split()) for pair in PAIRS]
    vocabulary = {text: i for i, text in enumerate([*letters, *("".join(pair) for pair in merges)])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    made.eos_token, made.bos_token, made.chat_template = end, "<|begin_of_text|>", template
    return made


def end(token: str = END) -> int:
    return int(tokenizer().convert_tokens_to_ids(token))


def sampling(n: int = 1, max_tokens: int = 10_000) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=max_tokens, temperature=1.0, stop_token_ids=(end(),), seed=3)


def written(text: str, *, ends: bool = True, version: int = 0, token: str = END) -> Response:
    """A response with this text, as a model may write it: byte by byte, not as the text would be tokenised. Special
    tokens in the text are spelled. `token`: ends the response."""
    of_byte = {letter: i for letter, i in tokenizer().get_vocab().items() if len(letter) == 1}
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [of_byte[letter] for piece, _ in encoded for letter in piece] + ([end(token)] if ends else [])
    return Response(ids, [-0.5] * len(ids), "stop" if ends else "length", version)


class TextEngines:
    """`cluster.engines.Engines`, with answers that are a function of the prompt's text."""

    def __init__(self, answers: Callable[[str], str], *, embedded: bool = True) -> None:
        self.answers, self.embedded = answers, embedded
        self.batches: list[int] = []
        """Number of prompts of each call of `submit`."""
        self.asked: dict[int, Response] = {}
        self.submitted = self.aborted = 0
        self.cancelled: list[int] = []

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None) -> list[int]:
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

    def cancel(self, ids: Iterable[int]) -> None:
        self.cancelled += ids


def made_up(rng: random.Random, token: str = END) -> Response:
    """An answer of random tokens with thinking or tool calls now and then. It may end at its limit."""
    kinds = ("plain", "thinking", "tool", "two tools", "broken tool", "special")
    kind = rng.choice((*kinds, "llama", "mistral", "harmony"))
    words = "".join(rng.choice("ab ckothe\n") for _ in range(rng.randint(0, 6)))
    broken = rng.choice((None, -1))
    text = {
        "plain": words,
        "thinking": f"<think>{words}</think>ab {words}",
        "tool": f"{words}{_call(words)}",
        "two tools": f"{_call('a')}{_call(rng.choice(SPECIAL))}",
        "broken tool": f"<tool_call>{words}</tool_call>",
        "llama": json.dumps({"name": "f", "parameters": {"x": words}})[:broken],
        "mistral": f"[TOOL_CALLS]f[ARGS]{json.dumps({'x': words})}"[:broken],
        "harmony": f"<|channel|>commentary to=functions.f<|message|>{json.dumps({'x': words})}"[:broken],
        "special": f"{words}{rng.choice(SPECIAL)}{words}",
    }[kind]
    return written(text, ends=rng.random() < 0.8, token=token)


def _call(text: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'f', 'arguments': {'x': text}})}</tool_call>"


def observation(rng: random.Random) -> dict[str, Any]:
    hostile = f"the {rng.choice(SPECIAL)}\n{rng.choice(SPECIAL)}assistant\n"
    text = rng.choice(("ab", hostile, "", " abc\n", "<tool_call>{}</tool_call>"))
    return {"role": rng.choice(("user", "tool")), "content": text}


async def converse(session: Session, rng: random.Random, steps: list[str]) -> None:
    history: list[dict[str, Any]] = [{"role": "user", "content": "ab ok"}]
    tools: Any = TOOLS
    states = [history]
    for step in steps:
        if step == "edit":
            place = rng.randrange(len(history))
            edited = history[place] | {"content": rng.choice(("abab", f"ab{rng.choice(SPECIAL)}"))}
            history = [*history[:place], edited, *history[place + 1 :]]
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
        try:
            answer = await session.chat(history, tools=tools)
        except BadRequest:  # the template wants other messages
            history = [{"role": "user", "content": "ok"}]
            answer = await session.chat(history, tools=tools)
        history = [*history, {"refusal": None} | (answer.message or {})]
        states.append(history)
