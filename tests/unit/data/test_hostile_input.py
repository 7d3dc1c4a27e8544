"""Data, templates and tokenizers that make libraries raise: a plain error with the place, never a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_rl.config.schema import DataSettings
from megatron_rl.data.prompts import first_prompt, load_prompts
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import UserError

DIGITS = "7" * (sys.get_int_max_str_digits() + 1)


@pytest.mark.parametrize(
    "value",
    [
        DIGITS,
        f"-{DIGITS}",
        f"[1, {DIGITS}]",
        f'{{"inputs": [{DIGITS}]}}',
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000,
    ],
)
@pytest.mark.parametrize("column", ["label", "prompt", "anything"])
def test_json_that_python_cannot_read_names_its_line(tmp_path, word_tokenizer, column, value):
    good = {"prompt": "2 + 2", "label": "4", "anything": 1}
    broken = "{" + ", ".join(f'"{name}": {value if name == column else json.dumps(good[name])}' for name in good) + "}"
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{broken}\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: "):
        load_prompts(path, tokenizer=word_tokenizer, settings=DataSettings(train=path))


@pytest.mark.parametrize("digits", [20, 400, sys.get_int_max_str_digits()])
def test_a_long_integer_label_stays_exact(read, digits):
    label = int("7" * digits)
    prompts = read([{"prompt": "2 + 2", "label": label}, {"prompt": "2 + 2", "label": label}], drop_duplicates=True)
    assert [prompt.label for prompt in prompts.prompts] == [label]


RAISING = {
    "its own exception": "{{ raise_exception('users only') }}",
    "TypeError": "{{ messages[0].content + 1 }}",
    "undefined": "{{ messages[0].content.missing.deeper }}",
    "ZeroDivisionError": "{{ 1 // 0 }}",
    "IndexError in a filter": "{{ messages | sort(attribute='nowhere.deeper') }}",
    "ValueError": "{{ 'x' | int('y', base=99) }}{{ ''.join([1]) }}",
    "OverflowError": "{% for i in range(10 ** 12) %}{% endfor %}",
    "unknown filter": "{{ messages | no_such_filter }}",
    "syntax": "{% if %}",
    "forbidden": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "KeyError": "{{ {}.pop('absent') }}",
}


def word_level(folder: Path, **more: object) -> Path:
    inner = Tokenizer(models.WordLevel({"hello": 0}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, **more).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RAISING)
@pytest.mark.parametrize("template", ["chat", "chat-boxed"])
def test_a_chat_template_that_raises_names_the_row(tmp_path, name, template):
    folder = word_level(tmp_path / "model", chat_template=RAISING[name])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "hello"}) + "\n")
    settings = DataSettings(train=path, template=template)
    words = r"rows\.jsonl, line 1: column prompt: the chat template refuses these messages: \w+: "
    with pytest.raises(UserError, match=words):
        load_prompts(path, tokenizer=load_tokenizer(folder), settings=settings)
    with pytest.raises(UserError, match=words):
        first_prompt(path, model_folder=folder, settings=settings)


def test_several_chat_templates_without_a_default_are_an_error(tmp_path, read):
    tokenizer = load_tokenizer(word_level(tmp_path / "model"))
    tokenizer.chat_template = {"tools": "a", "rag": "b"}
    with pytest.raises(UserError, match=r"only named chat templates \(tools, rag\)"):
        read([{"prompt": "hello"}], tokenizer=tokenizer, template="chat")
    tokenizer.chat_template = {"default": "hello", "rag": "b"}
    (prompt,) = read([{"prompt": "hello"}], tokenizer=tokenizer, template="chat").prompts
    assert prompt.token_ids == (0,)


@pytest.mark.parametrize("template", ["none", "boxed", "r1-zero", "zero"])
def test_a_prompt_outside_the_vocabulary_names_the_row(tmp_path, read, template):
    tokenizer = load_tokenizer(word_level(tmp_path / "model"))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: the tokenizer cannot encode the prompt"):
        read([{"prompt": "goodbye"}], tokenizer=tokenizer, template=template)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": "1.0"}',
        '{"model": {"type": "None"}}',
        '{"model": {"type": "BPE", "vocab": 3}}',
    ],
)
def test_a_damaged_tokenizer_file_is_a_plain_error(tmp_path, text):
    folder = word_level(tmp_path / "model")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="model: the tokenizer cannot be loaded"):
        load_tokenizer(folder)
