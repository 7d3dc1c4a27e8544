"""Tests of the templates with a real tokenizer: the model gets exactly the text of the template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.schema import DataSettings
from megatron_rl.data.prompts import first_prompt
from megatron_rl.data.template import render
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import UserError

WORDS = ["<bos>", "<unk>", "<user>", "<assistant>", "hello", "world"]
TEMPLATE = (
    "<bos> {% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
    "<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that adds <bos> to every text by default."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def test_special_tokens_come_only_from_the_prompt_or_its_template(folder, read):
    tokenizer = load_tokenizer(folder)
    rows = [{"prompt": "<bos> hello"}, {"prompt": [{"role": "user", "content": "hello world"}]}]
    plain = read(rows, tokenizer=tokenizer).prompts
    assert [prompt.token_ids for prompt in plain] == [(0, 4), (4, 5)]
    chat = read(rows[1:], tokenizer=tokenizer, template="chat").prompts
    assert [prompt.token_ids for prompt in chat] == [(0, 2, 4, 5, 3)]


BOXED = "hello\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("none", "hello"),
        ("chat", "<bos> <user> hello <assistant>"),
        ("boxed", BOXED),
        ("zero", f"User: {BOXED}\nAssistant: Let me solve this step by step.\n<think>"),
        ("chat-boxed", f"<bos> <user> {BOXED} <assistant>"),
    ],
)
@pytest.mark.parametrize("prompt", ["hello", [{"role": "user", "content": "hello"}]])
def test_a_template_gives_the_expected_text(folder, template, text, prompt):
    assert render(prompt, tokenizer=load_tokenizer(folder), template=template) == text


def test_r1_zero_ends_where_the_assistant_starts(folder):
    text = render("What is {x}?", tokenizer=None, template="r1-zero")
    assert "User: What is {x}? Give the final answer within \\boxed{}. Assistant:" in text
    assert text.endswith("Assistant:") and text.count("<think>") == 2


@pytest.mark.parametrize("template", ["none", "boxed", "r1-zero", "zero", "chat", "chat-boxed"])
def test_the_first_prompt_shown_equals_the_first_prompt_in_training(folder, read, tmp_path, template):
    rows = [{"prompt": "hello world"}, {"prompt": "hello"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(train=tmp_path / "rows.jsonl", template=template)
    expected = read(rows, tokenizer=load_tokenizer(folder), template=template).prompts[0].text
    assert first_prompt(tmp_path / "rows.jsonl", model_folder=folder, settings=settings) == expected


def test_messages_that_the_chat_template_refuses_are_an_error(folder, read):
    rows = [{"prompt": [{"role": "system", "content": "hello"}]}]
    with pytest.raises(UserError, match=r"line 1: column prompt: the chat template refuses .*users only"):
        read(rows, tokenizer=load_tokenizer(folder), template="chat")


def test_a_tokenizer_without_a_chat_template_is_an_error(folder, read):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        read([{"prompt": "hello"}], tokenizer=tokenizer, template="chat")


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer here; expected one of tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_an_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
