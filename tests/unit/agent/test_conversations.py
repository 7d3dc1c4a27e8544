"""Whatever an agent does with its history: every token is trained as it was sampled, once, after what the model saw."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.agent.messages import MALFORMED, for_template, key_of, normalised
from megatron_rl.agent.session import Session
from megatron_rl.batching.sequences import sequences_of
from megatron_rl.types import Ids, Response, SamplingParams
from tests.tiers import examples
from tests.unit.agent.families import FAMILIES
from tests.unit.agent.kit import (
    END,
    ROOM,
    STEPS,
    THINKING_REMOVED,
    TOOLS,
    converse,
    made_up,
    sampling,
    tokenizer,
    written,
)


@dataclass
class Engine:
    """Notes what was asked, and gives every sampled token a log-prob of its own."""

    rng: random.Random
    end: str = END
    calls: list[tuple[Ids, Response]] = field(default_factory=list)

    async def sample(self, prompt: Ids, sampling: SamplingParams) -> Response:
        count = sum(len(answer) for _, answer in self.calls)
        answer = made_up(self.rng, self.end)
        answer = replace(answer, log_probs=-1.0 - np.arange(count, count + len(answer)), weight_version=len(self.calls))
        self.calls.append((prompt, answer))
        return answer


@examples(100)
@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=12),
    family=st.sampled_from(sorted(FAMILIES)),
)
def test_every_sampled_token_is_trained_once_after_what_the_model_saw(seed: int, steps: list[str], family: str) -> None:
    rng = random.Random(seed)
    engine = Engine(rng, FAMILIES[family][1])
    session = Session(tokenizer(*FAMILIES[family]), engine.sample, sampling(), ROOM)
    asyncio.run(converse(session, rng, steps))
    rollout = session.recorded((0,), None)

    batch = sequences_of([((0,), rollout)])
    found = batch.values["rollout_log_probs"]
    sampled = np.concatenate([answer.log_probs for _, answer in engine.calls])
    assert sorted(found.tolist()) == sorted(sampled.tolist())
    seen = {
        float(log_prob): [*prompt.tolist(), *answer.token_ids[: i + 1].tolist()]
        for prompt, answer in engine.calls
        for i, log_prob in enumerate(answer.log_probs)
    }
    versions = {float(p): k for k, (_, answer) in enumerate(engine.calls) for p in answer.log_probs}
    for row, sequence in enumerate(rollout.sequences):
        ids = batch.sequence(row).tolist()
        places = np.flatnonzero(batch.mask_of(row))
        values = batch.values_of([row], found).tolist()
        for place, value in zip(places.tolist(), values, strict=True):
            assert ids[: place + 1] == seen[value]
        assert sequence.sampled(sequence.weight_versions).tolist() == [versions[value] for value in values]


def test_a_conversation_that_goes_on_is_one_sequence_with_the_ids_that_were_sampled() -> None:
    """The model writes `abc` with three tokens; encoding the text would give one."""
    answers = iter([written("abc"), written('<tool_call>{"name": "f", "arguments": {}}</tool_call>'), written("ok")])

    async def sample(prompt: Ids, sampling: SamplingParams) -> Response:
        return next(answers)

    async def talk() -> Session:
        session = Session(tokenizer(), sample, sampling(), ROOM)
        messages = [{"role": "user", "content": "ab"}]
        for added in ({"role": "user", "content": "the"}, {"role": "tool", "content": "ok"}, None):
            answer = await session.chat(messages, tools=TOOLS)
            messages = [*messages, answer.message, added]
        return session

    rollout = asyncio.run(talk()).recorded((0,), None)
    assert rollout.others == ()
    words = tokenizer()
    assert len(words.encode("abc", add_special_tokens=False)) == 1
    assert rollout.token_ids[:3].tolist() == written("abc", ends=False).token_ids.tolist()
    unsampled = words.decode(rollout.token_ids[~rollout.sampled_mask].tolist())
    assert unsampled == "\n<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n" + (
        "\n<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\n"
    )


DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize("text", ["[" * 1000, f'{{"name": "f", "arguments": {{"x": {DEEP}}}}}'])
def test_a_conversation_goes_on_after_a_call_that_is_nested_too_deeply(text: str) -> None:
    async def sample(prompt: Ids, sampling: SamplingParams) -> Response:
        return written(f"<tool_call>{text}</tool_call>")

    async def talk() -> Session:
        session = Session(tokenizer(), sample, sampling(), ROOM)
        messages = [{"role": "user", "content": "ab"}]
        answer = await session.chat(messages, tools=TOOLS)
        assert answer.message and answer.message["tool_calls"][0]["function"]["name"] == MALFORMED
        await session.chat([*messages, answer.message, {"role": "tool", "content": "error"}], tools=TOOLS)
        return session

    assert asyncio.run(talk()).recorded((0,), None).others == ()


def test_arguments_of_a_tool_call_may_be_an_object() -> None:
    def known(arguments: Any) -> Any:
        call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
        (message,) = normalised([{"role": "assistant", "tool_calls": [call]}])
        return message

    assert known({"x": "é"}) == known('{"x": "é"}')
    assert key_of(known('{"x":"\\u00e9"}')) == key_of(known({"x": "é"})) != key_of(known({"x": "e"}))
    assert for_template(known({"x": "é"}))["tool_calls"][0]["function"]["arguments"] == {"x": "é"}


def test_thinking_that_the_template_removes_makes_another_sequence() -> None:
    answers = iter([written("<think>a</think>b"), written("c")])
    prompts: list[str] = []

    async def sample(prompt: Ids, sampling: SamplingParams) -> Response:
        prompts.append(tokenizer().decode(prompt.tolist()))
        return next(answers)

    async def talk() -> Session:
        session = Session(tokenizer(THINKING_REMOVED), sample, sampling(), ROOM)
        messages = [{"role": "user", "content": "ab"}]
        answer = await session.chat(messages)
        await session.chat([*messages, answer.message, {"role": "user", "content": "the"}])
        return session

    rollout = asyncio.run(talk()).recorded((0,), None)
    assert len(rollout.sequences) == 2
    assert "think" not in prompts[1] and "assistant\nb<|im_end|>" in prompts[1]
