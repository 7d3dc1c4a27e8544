"""Agents' rollouts at a time: threads, memory and calls per second of the machinery around the engines.

    python benchmarks/agent_sessions.py [--rollouts 1000] [--turns 4] [--out benchmarks/results/agent_sessions.json]

Every rollout chats for so many turns, once in process (`model.chat`) and once over HTTP with a connection of its own,
as an unmodified program would. The engines are stand-ins that answer at once with 32 tokens, and the tokenizer encodes
bytes, so that what is measured is sessions, rendering, recording and HTTP. Server and clients share one event loop and
one core: a client elsewhere costs this process less.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep
from megatron_rl.agent.model import Agent, Model
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.types import Prompt, Response, SamplingParams

TOKENS = 32
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class InstantEngines:
    """Engines that answer every request at once."""

    embedded = False

    def __init__(self, end: int) -> None:
        self.response = Response([64] * (TOKENS - 1) + [end], [-1.0] * TOKENS, "stop", 0)
        self.submitted = 0

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None) -> list[int]:
        self.submitted += len(prompts)
        return list(range(self.submitted - len(prompts), self.submitted))

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        return set(ids)

    def take(self, request: int) -> list[Response]:
        return [self.response]

    def abort(self, ids: Iterable[int]) -> None:
        pass

    def cancel(self, ids: Iterable[int]) -> None:
        pass


def byte_tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


class Talk:
    """An agent that chats, and notes how many threads and how much memory there are meanwhile."""

    def __init__(self, turns: int, *, http: bool) -> None:
        self.turns, self.http = turns, http
        self.threads = self.memory = self.now = self.most = 0

    async def __call__(self, model: Model, prompt: Prompt) -> float:
        self.now += 1
        self.most = max(self.most, self.now)
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt.text}]
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {model.api_key}"}) as client:
            for _ in range(self.turns):
                messages.append(await (self._posted(client, model, messages) if self.http else model.chat(messages)))
                messages.append({"role": "user", "content": "What follows from this?"})
        self.threads = max(self.threads, threading.active_count())
        self.memory = max(self.memory, psutil.Process().memory_info().rss)
        self.now -= 1
        return 1.0

    async def _posted(self, client: aiohttp.ClientSession, model: Model, messages: list[dict[str, Any]]) -> Any:
        body = {"model": model.name, "messages": messages}
        async with client.post(f"{model.base_url}/chat/completions", json=body) as answer:
            return (await answer.json())["choices"][0]["message"]


def measured(rollouts: int, turns: int, *, http: bool) -> dict[str, float]:
    tokenizer = byte_tokenizer()
    talk = Talk(turns, http=http)
    agent: Agent = talk
    engines = InstantEngines(tokenizer.eos_token_id)
    sampling = SamplingParams(rollouts, 10**6, 1.0, (tokenizer.eos_token_id,), 0)
    before = psutil.Process().memory_info().rss
    with AgentRollouts(AgentSettings(function="own:agent"), agent, engines, tokenizer, 10**6) as running:
        start, processor = time.perf_counter(), time.process_time()
        (group,) = running.generate([Prompt("", (1,), "What is 3 + 4?", None)], sampling)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    assert all(response.num_sampled_tokens == turns * TOKENS for response in group)
    assert all(len(response.sequences) == 1 for response in group)
    return {
        "rollouts_at_a_time": talk.most,
        "threads": talk.threads,
        "mib_more": (talk.memory - before) / 2**20,
        "calls": rollouts * turns,
        "wall_seconds": seconds,
        "processor_seconds": processor,
        "calls_per_processor_second": rollouts * turns / processor,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args()
    found = {
        name: measured(options.rollouts, options.turns, http=http)
        for name, http in (("in process", False), ("over HTTP", True))
    }
    table = Table("", *found)
    for row in found["in process"]:
        table.add_row(row.replace("_", " "), *(f"{found[name][row]:,.4g}" for name in found))
    Console().print(table)
    keep(options.out, "agent_sessions", rollouts=options.rollouts, turns=options.turns, found=found)


if __name__ == "__main__":
    main()
