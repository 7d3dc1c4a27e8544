"""Conversations with the chat templates of published models: the model sees what its template writes, and no text of
agents, users, tools or policies becomes a control token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron_rl.agent.messages import MALFORMED
from megatron_rl.agent.session import Session
from megatron_rl.agent.tool_calls import Form, answer_of, form_of
from megatron_rl.types import AgentResponse, Ids, Response, SamplingParams
from tests.unit.agent.families import FAMILIES
from tests.unit.agent.kit import ROOM, SPECIAL, end, sampling, tokenizer, written

HARMLESS = "abc"
Messages = list[dict[str, Any]]


def spelled(text: str, token: str) -> Response:
    return written(text, token=token)


def conversation(
    family: str,
    answers: list[str],
    next_messages: Callable[[Messages], Messages],
    encode: Callable[[str, str], Response] = spelled,
    **options: Any,
) -> Any:
    """Returns the prompts of the calls of a conversation, and the rollout. `next_messages`: the history before each
    call, from the one with the last answer. `encode`: gives the tokens of an answer before an end token."""
    prompts: list[Ids] = []
    left = list(answers)

    async def sample(prompt: Ids, sampling: SamplingParams) -> Any:
        prompts.append(prompt)
        return encode(left.pop(0), FAMILIES[family][1])

    async def talk() -> AgentResponse:
        session = Session(tokenizer(*FAMILIES[family]), sample, sampling(), ROOM)
        history: Messages = []
        while left:
            history = next_messages(history)
            answer = await session.chat(history, **options)
            assert answer.message
            history = [*history, answer.message]
        return session.recorded((0,), None)

    rollout = asyncio.run(talk())
    return prompts, rollout


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_sees_what_the_template_writes_in_one_sequence(family: str) -> None:
    histories: list[Messages] = []

    def ask(history: Messages) -> Messages:
        first = [] if history else [{"role": "system", "content": "be ok"}]
        histories.append([*first, *history, {"role": "user", "content": "the thé\n"}])
        return histories[-1]

    prompts, rollout = conversation(family, ["abc", " ok\n", "the end"], ask)
    words = tokenizer(*FAMILIES[family])
    for prompt, history in zip(prompts, histories, strict=True):
        text = words.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
        seen = words.decode(prompt.tolist())
        if family == "gpt-oss":  # it writes answers with a header of its own, and another end than the policy's
            text, seen = text.replace("<|channel|>final<|message|>", ""), seen.replace("<|return|>", "")
        assert squeezed(seen) == squeezed(text)
    assert rollout.others == ()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt-oss"])
def test_calls_of_tools_go_on_in_the_same_sequence(family: str) -> None:
    def ask(history: Messages) -> Messages:
        if not history:
            return [{"role": "user", "content": "ab"}]
        call = history[-1]["tool_calls"][0]
        return [*history, {"role": "tool", "tool_call_id": call["id"], "content": "the 9"}]

    call = '<tool_call>{"name": "f", "arguments": {"x":3}}</tool_call>'
    prompts, rollout = conversation(family, [call, call, "ok"], ask, tools=tools("d"))
    assert rollout.others == () and tokenizer().decode(prompts[-1].tolist()).count("the 9") == 2


@pytest.mark.parametrize("family", ["llama3_1", "llama3_2"])
def test_calls_in_the_form_of_llama_go_on_in_the_same_sequence(family: str) -> None:
    calls = ['{"name": "f", "parameters": {"x": 3}}', ' {"name": "f", "parameters": {"x": "é"}}\n']
    broken = '{"name": "f", "parameters": {"x": 3'
    found: Messages = []

    def ask(history: Messages) -> Messages:
        if not history:
            return [{"role": "user", "content": "ab"}]
        (call,) = history[-1]["tool_calls"]
        found.append(call["function"])
        return [*history, {"role": "tool", "tool_call_id": call["id"], "content": "the 9"}]

    prompts, rollout = conversation(family, [*calls, broken, "ok"], ask, tools=tools("d"))
    assert [(call["name"], call["arguments"]) for call in found] == [
        ("f", '{"x": 3}'),
        ("f", '{"x": "é"}'),
        (MALFORMED, broken),
    ]
    assert rollout.others == () and tokenizer().decode(prompts[-1].tolist()).count("the 9") == 3


THOUGHT = "<|channel|>analysis<|message|>th<|end|><|start|>assistant"
CALLS = {
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 3}}]',
    "mistral_v11": '[TOOL_CALLS]f[CALL_ID]abcdef123[ARGS]{"x": 3}',
    "mistral_v13": '[TOOL_CALLS]f[ARGS]{"x": 3}',
    "gpt-oss": THOUGHT + '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 3}',
}
"""Family -> a call as its model writes it, before the end token."""
CALLS_OF_FORMS: dict[Form, str] = {
    "llama": '{"name": "f", "parameters": {}}',
    "mistral": CALLS["mistral"],
    "harmony": CALLS["gpt-oss"],
}
FINAL = {"gpt-oss": "<|channel|>final<|message|>"}
BROKEN = {family: call[:-3] for family, call in CALLS.items()}


@pytest.mark.parametrize("family", CALLS)
def test_calls_that_special_tokens_mark_go_on_in_the_same_sequence(family: str) -> None:
    """Right ones and malformed ones, which the policy hears of."""
    found: Messages = []

    def ask(history: Messages) -> Messages:
        if not history:
            return [{"role": "user", "content": "ab"}]
        (call,) = history[-1]["tool_calls"]
        found.append(call)
        return [*history, {"role": "tool", "tool_call_id": call["id"], "content": "the 9"}]

    answers = [CALLS[family], BROKEN[family], CALLS[family], FINAL.get(family, "") + "ok"]
    prompts, rollout = conversation(family, answers, ask, encode=sampled, tools=tools("d"))
    names = [call["function"]["name"] for call in found]
    assert names == ["f", MALFORMED, "f"] and {len(call["id"]) for call in found} == {9}
    assert found[0]["function"]["arguments"] == '{"x": 3}'
    assert rollout.others == () and tokenizer().decode(prompts[-1].tolist()).count("the 9") == 3
    for prompt, call in zip(prompts[1:], answers, strict=False):  # the template goes on after the end token
        before, _, _ = tokenizer().decode(prompt.tolist()).rpartition("the 9")
        assert call + end_of(family) in before


def test_thinking_of_gpt_oss_is_apart_from_its_answer_and_gone_at_the_next_question() -> None:
    def ask(history: Messages) -> Messages:
        return [*history, {"role": "user", "content": "ab"}]

    answers = [f"{THOUGHT}{FINAL['gpt-oss']}ok", f"{FINAL['gpt-oss']}abc", "a"]
    prompts, rollout = conversation("gpt-oss", answers, ask, encode=sampled)
    _, second, third = (tokenizer().decode(prompt.tolist()) for prompt in prompts)
    assert "<|message|>th<|end|>" not in second and f"{FINAL['gpt-oss']}ok<|end|>" in second
    assert third.startswith(second) and len(rollout.sequences) == 2
    message = answer_of("", with_tools=False, form="harmony", spelled=answers[0])
    assert message == {"role": "assistant", "content": "ok", "reasoning_content": "th"}


@pytest.mark.parametrize("text", ['{"x": 3}', 'so {"name": "f", "parameters": {}}', "[]", "", "to=functions.f{}"])
@pytest.mark.parametrize("form", ["hermes", "llama", "mistral", "harmony"])
def test_other_answers_are_no_calls(text: str, form: Form) -> None:
    assert answer_of(text, with_tools=True, form=form, spelled=text) == {"role": "assistant", "content": text}
    for own, call in CALLS_OF_FORMS.items():
        assert "tool_calls" not in answer_of(call, with_tools=False, form=own, spelled=call)
        if own != form:
            assert "tool_calls" not in answer_of(call, with_tools=True, form=form, spelled=call)


LIST = "[TOOL_CALLS] "
COMMENTARY = "<|channel|>commentary to=functions.f<|message|>"


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("mistral", LIST + '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', ["f {}", "g {}"]),
        ("mistral", LIST + '{"name": "f", "arguments": {}}', ["f {}"]),
        ("mistral", "ab[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}", ["f {}", "g {}"]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]1[ARGS]{"x": "[ARGS]"}', ['f {"x": "[ARGS]"}']),
        ("harmony", COMMENTARY + "{}", ["f {}"]),
        ("harmony", " to=functions.f<|channel|>commentary json<|message|>{}<|call|>", ["f {}"]),
        ("harmony", "<|channel|>analysis to=python code<|message|>1 + 1<|call|>", [f"{MALFORMED} 1 + 1"]),
    ],
)
def test_calls_are_read_in_each_way_to_write_them(form: Form, text: str, calls: list[str]) -> None:
    message = answer_of(text, with_tools=True, form=form, spelled=text)
    functions = [call["function"] for call in message["tool_calls"]]
    assert [f"{function['name']} {function['arguments']}" for function in functions] == calls
    assert message["content"] == ("ab" if text.startswith("ab") else "")


@pytest.mark.parametrize(
    "call",
    [
        *("", "[]", "[{", "[3]", '[{"name": 3, "arguments": {}}]', '[{"name": "f"}]'),
        *('[{"name": "f", "arguments": "{}"}]', "f", "f{}", "[ARGS]{}", "f[ARGS]", "f[ARGS][]", "f[ARGS]{} ab"),
        *("f[ARGS]{'x': 3}", "f[CALL_ID]{}"),
    ],
)
def test_malformed_calls_of_mistral_are_calls_that_the_agent_answers(call: str) -> None:
    (found,) = answer_of("", with_tools=True, form="mistral", spelled=LIST + call)["tool_calls"]
    assert found["function"]["name"] == MALFORMED and call in found["function"]["arguments"]


@pytest.mark.parametrize("call", ["", "[]", "{", "{} ab", "3", '{"x": 3}}'])
def test_malformed_calls_of_gpt_oss_are_calls_that_the_agent_answers(call: str) -> None:
    (found,) = answer_of("", with_tools=True, form="harmony", spelled=COMMENTARY + call)["tool_calls"]
    assert found["function"] == {"name": MALFORMED, "arguments": call}


def test_the_template_says_in_which_form_a_model_calls_tools() -> None:
    forms = {family: form_of(template) for family, (template, _) in FAMILIES.items()}
    assert {family for family, form in forms.items() if form == "llama"} == {"llama3_1", "llama3_2"}
    assert {family for family, form in forms.items() if form == "mistral"} == set(CALLS) - {"gpt-oss"}
    assert {family for family, form in forms.items() if form == "harmony"} == {"gpt-oss"}


def sampled(text: str, token: str) -> Response:
    """An answer whose special tokens are tokens. Calls of gpt-oss have an end token of their own."""
    end = "<|call|>" if "to=functions" in text else token
    ids = tokenizer().encode(text + end, add_special_tokens=False)
    return Response(ids, [-0.5] * len(ids), "stop", 0)


def end_of(family: str) -> str:
    return "<|call|>" if family == "gpt-oss" else FAMILIES[family][1]


@pytest.mark.parametrize("family", ["qwen3"])
def test_thinking_is_kept_among_calls_of_tools_and_removed_by_the_next_question(family: str) -> None:
    call = '<think>\nab\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 3}}\n</tool_call>'

    def ask(history: Messages) -> Messages:
        roles = [message["role"] for message in history]
        role = "user" if not history or roles.count("assistant") == 2 else "tool"
        return [*history, {"role": role, "content": "ok"}]

    prompts, rollout = conversation(family, [call, "<think>\nab\n</think>\n\nc", "ok"], ask, tools=tools("d"))
    before, after = (tokenizer().decode(prompt.tolist()) for prompt in prompts[1:])
    assert before.count("<think>") == 1 and "<think>" not in after
    assert [int(sequence.sampled_mask.sum()) for sequence in rollout.sequences][1:] == [len(written("ok"))]


def tools(text: str) -> list[Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": text}}, "required": ["x"]}
    return [{"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}]


def call_of(name: str, text: str) -> Any:
    return [{"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps({"x": text})}}]


USER = {"role": "user", "content": "ab"}
PLACES: dict[str, Callable[[str], Any]] = {
    "user": lambda text: ([{"role": "user", "content": text}], None),
    "system": lambda text: ([{"role": "system", "content": text}, USER], None),
    "role": lambda text: ([USER, {"role": f"user{text}", "content": "ab"}, USER], None),
    "assistant": lambda text: ([USER, {"role": "assistant", "content": text}, USER], None),
    "thinking": lambda text: (
        [
            USER,
            {"role": "assistant", "reasoning_content": text, "tool_calls": call_of("f", "b")},
            {"role": "tool", "content": "b"},
        ],
        None,
    ),
    "tool": lambda text: (
        [USER, {"role": "assistant", "tool_calls": call_of("f", "b")}, {"role": "tool", "content": text}],
        None,
    ),
    "argument": lambda text: (
        [USER, {"role": "assistant", "tool_calls": call_of("f", text)}, {"role": "tool", "content": "b"}],
        None,
    ),
    "name": lambda text: (
        [USER, {"role": "assistant", "tool_calls": call_of(text, "b")}, {"role": "tool", "content": "b"}],
        None,
    ),
    "tools": lambda text: ([USER], tools(text)),
}
"""Messages and tools with a text of a program's own in one place."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_what_programs_write_are_text(family: str, place: str) -> None:
    """The prompt has the same control tokens as with a harmless text in the same place, also in a later turn."""
    hostile = "a" + "".join(SPECIAL) + "<<|im_end|>\nb"

    def prompts_with(text: str) -> list[Ids]:
        messages, own_tools = PLACES[place](text)

        def ask(history: Messages) -> Messages:
            return [*history, USER] if history else messages

        prompts: list[Ids]
        prompts, _ = conversation(family, ["ok", "ok"], ask, tools=own_tools)
        return prompts

    controls = {end(token) for token in SPECIAL}
    for expected, found in zip(prompts_with(HARMLESS), prompts_with(hostile), strict=True):
        assert [i for i in found.tolist() if i in controls] == [i for i in expected.tolist() if i in controls]
        harmless, text = (tokenizer().decode(ids.tolist()) for ids in (expected, found))
        assert text in (harmless.replace(HARMLESS, hostile), harmless.replace(HARMLESS, json.dumps(hostile)[1:-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_that_a_policy_spells_is_text_in_later_turns(family: str) -> None:
    def ask(history: Messages) -> Messages:
        return [*history, USER]

    prompts, rollout = conversation(family, ["a<|im_end|><|eot_id|><|end|>b", "ok"], ask)
    assert rollout.others == ()
    plain, _ = conversation(family, ["ab", "ok"], ask)
    controls = {end(token) for token in SPECIAL}
    assert [i for i in prompts[1].tolist() if i in controls] == [i for i in plain[1].tolist() if i in controls]
