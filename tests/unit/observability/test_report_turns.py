"""Conversations in the viewer: turns are found by what chat templates write, and sequences stay apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.observability.report.responses import NOT_SAMPLED, response_groups
from megatron_rl.observability.report.run_data import read_run
from megatron_rl.observability.report.tokens import Vocabulary
from megatron_rl.observability.report.turns import turns_of

CONVERSATIONS = {
    "Qwen": "<|im_start|>;system;\n;Hi;<|im_end|>;\n;<|im_start|>;user;\n;2+2;<|im_end|>;\n;<|im_start|>;assistant;\n;"
    "+<tool_call>;+2+2;+<|im_end|>;\n;<|im_start|>;user;\n;<tool_response>;4;</tool_response>;<|im_end|>;\n;"
    "<|im_start|>;assistant;\n;+Four;+<|im_end|>",
    "Llama 3": "<|begin_of_text|>;<|start_header_id|>;system;<|end_header_id|>;Hi;<|eot_id|>;<|start_header_id|>;user;"
    "<|end_header_id|>;2+2;<|eot_id|>;<|start_header_id|>;assistant;<|end_header_id|>;+2+2;+<|eom_id|>;"
    "<|start_header_id|>;ip;ython;<|end_header_id|>;4;<|eot_id|>;<|start_header_id|>;assistant;<|end_header_id|>;+Four",
    "GLM": "<sop>;<|system|>;<|user|>;2+2;<|assistant|>;+call;+<|observation|>;<|observation|>;4;<|assistant|>;+Four",
    "Mistral": "<s>;[AVAILABLE_TOOLS];tools;[INST];2+2;[/INST];+call;[TOOL_RESULTS];4;[/TOOL_RESULTS];+Four",
    "gpt-oss": "<|start|>;system;<|message|>;Hi;<|end|>;<|start|>;user;<|message|>;2+2;<|end|>;<|start|>;assistant;"
    "+<|channel|>;+commentary to=functions.f;+<|message|>;+{};+<|call|>;<|start|>;functions;.f to=assistant;"
    "<|channel|>;commentary;<|message|>;4;<|end|>;<|start|>;assistant;+<|channel|>;+final;+<|message|>;+Four",
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turns_begin_where_the_template_says_so(name: str) -> None:
    tokens = CONVERSATIONS[name].split(";")
    texts = [token.removeprefix("+") for token in tokens]
    turns = turns_of(texts, [token.startswith("+") for token in tokens])
    assert [role for role, _ in turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns[0][1] == 0 and all(not tokens[place].startswith("+") for _, place in turns)


def test_a_role_that_the_policy_writes_begins_no_turn() -> None:
    assert turns_of(["<|user|>", "a", "<|assistant|>", "b", "<|user|>"], [False, False, False, True, True]) == [
        ("user", 0),
        ("assistant", 2),
    ]
    assert turns_of(["3", "+", "5", "calc", "8"], [True] * 4 + [False]) == []


def test_a_long_word_where_a_cut_context_begins_is_read_once() -> None:
    texts = ["a" * 1_000_000, "<|im_start|>", "user", "\n", "b"]
    assert turns_of(texts, [False] * len(texts)) == [("user", 0)]


def test_the_sequences_of_a_rollout_are_conversations_of_their_own(agent_run: Path) -> None:
    first, _ = response_groups(read_run(agent_run).dumps, Vocabulary([agent_run]))
    assert [(s["rollout"], s["sequence"], s["sequences"]) for s in first["samples"]] == [
        (0, 1, 2),
        (0, 2, 2),
        (1, 1, 2),
        (1, 2, 2),
    ]
    whole, check = first["samples"][:2]
    assert [role for role, _ in whole["turns"]] == ["system", "system", "user", "assistant", "tool", "assistant"]
    assert [role for role, _ in check["turns"]] == ["user", "assistant"]
    tool = slice(whole["turns"][4][1], whole["turns"][5][1])
    assert "56" in "".join(whole["texts"][tool]) and set(whole["marks"][tool]) == {NOT_SAMPLED}
    sampled = [text for text, mark in zip(whole["texts"], whole["marks"], strict=True) if mark != NOT_SAMPLED]
    assert "".join(sampled).endswith("It is <b>56</b>.<|im_end|>") and len(sampled) == whole["tokens"]
