"""Files in the known schemas become prompts, and any other file is an error with the position of the problem."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.config.schema import DataSettings
from megatron_rl.data.prompts import load_prompts
from megatron_rl.errors import UserError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2 ?"}]
DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"content": "Solve the following math problem step by step.", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
"""The columns of DAPO-Math-17k."""


def error_of(read, rows, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(rows, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_slime_rows_become_prompts(read, name):
    found = read(
        [{"prompt": "one two", "label": "3", "level": 1}, {"prompt": "three", "label": "5", "level": 2}], name=name
    )
    assert found.schema == "slime"
    assert [(p.id, p.text, p.token_ids, p.label, p.metadata) for p in found.prompts] == [
        ("rows:0", "one two", (3, 3), "3", {"level": 1}),
        ("rows:1", "three", (5,), "5", {"level": 2}),
    ]
    assert (found.dropped, found.truncated) == ({}, 0)


def test_slime_rows_may_have_messages(read):
    (prompt,) = read([{"prompt": MESSAGES, "label": 4}]).prompts
    assert prompt.text == "Be brief.\nWhat is 2 + 2 ?"
    assert prompt.label == 4


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_verl_rows_of_dapo_become_prompts(read, name):
    found = read([DAPO_ROW], name=name)
    (prompt,) = found.prompts
    assert found.schema == "verl"
    assert prompt.text == "Solve the following math problem step by step."
    assert prompt.label == "34"
    assert prompt.metadata == {key: DAPO_ROW[key] for key in ("data_source", "ability", "extra_info")}


@pytest.mark.parametrize("prompt", ["two words", MESSAGES])
def test_trl_rows_may_have_a_prompt_only(read, prompt):
    found = read([{"prompt": prompt, "difficulty": "hard"}])
    assert found.schema == "trl"
    assert found.prompts[0].label is None
    assert found.prompts[0].metadata == {"difficulty": "hard"}


@pytest.mark.parametrize("column", ["solution", "answer", "ground_truth"])
def test_trl_finds_a_label_by_its_usual_names(read, column):
    found = read([{"prompt": "p", column: "42", "other": 1}])
    assert found.schema == "trl"
    assert found.prompts[0].label == "42"
    assert found.prompts[0].metadata == {"other": 1}


@pytest.mark.parametrize("column", ["label", "answer", "ground_truth"])
def test_a_row_of_nemo_gym_stays_whole(read, column):
    row = {"responses_create_params": {"input": "p"}, column: "42"}
    (prompt,) = read([{"prompt": "p", **row}]).prompts
    assert (prompt.label, prompt.metadata) == ("42", row)


def test_label_field_selects_the_label_in_any_schema(read):
    rows = [{"prompt": "p", "label": "no", "target": "yes"}]
    (prompt,) = read(rows, label_field="target").prompts
    assert (prompt.label, prompt.metadata) == ("yes", {"label": "no"})
    assert read([DAPO_ROW], label_field="ability").prompts[0].label == "MATH"
    assert "no column gold (data.label_field) among prompt, label, target" in error_of(read, rows, label_field="gold")


def test_unknown_columns_are_listed_beside_the_three_schemas(read):
    message = error_of(read, [{"question": "q", "answer": "a"}])
    assert "rows.jsonl, line 1: no known schema has the columns question, answer" in message
    for schema in ("slime:", "verl:", "trl:"):
        assert schema in message


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"prompt": 5, "label": 1}, "column prompt: expected text or a list of messages, found a number"),
        ({"label": 1}, "column prompt: expected text or a list of messages, found nothing"),
        ({"prompt": [], "label": 1}, "column prompt: expected text or a list of messages, found an empty list"),
        ({"prompt": "", "label": 1}, "column prompt: the prompt is empty"),
        ({"prompt": "\ud800", "label": 1}, "surrogates not allowed"),
        ({"prompt": "p"}, "column label: no value"),
        ({"prompt": [{"role": "user"}], "label": 1}, "column prompt: message 0: expected {role: text, content: text}"),
        ({"prompt": ["hello"], "label": 1}, "column prompt: message 0: expected {role: text, content: text}"),
    ],
)
def test_a_wrong_row_is_reported_with_file_row_and_column(read, second, words):
    message = error_of(read, [{"prompt": "p", "label": 1}, second])
    assert "rows.jsonl, line 2: " in message
    assert words in message


@pytest.mark.parametrize(
    ("reward_model", "words"),
    [("34", "column reward_model: expected {ground_truth: ...}, found text"),
     ({"style": "rule"}, "column reward_model.ground_truth: no value")],
)  # fmt: skip
def test_a_wrong_verl_row_is_reported_with_its_column(read, reward_model, words):
    assert words in error_of(read, [{"prompt": "p", "reward_model": reward_model}])


def test_parquet_rows_are_counted_from_zero(read):
    rows = [{"prompt": "p", "label": "a"}, {"prompt": "p", "label": None}]
    assert "rows.parquet, row 1: column label: no value" in error_of(read, rows, name="rows.parquet")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_an_empty_data_set_is_an_error(read, name):
    assert "rows" in error_of(read, [], name=name)
    assert error_of(read, [], name=name).endswith("the data set is empty")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "p", "label": 1}\n{"prompt": \n', "line 2: not valid JSON"),
        (b'\n{"prompt": "p", "label": 1}\n\n[1, 2]\n', "line 4: expected an object, {...}, found [1, 2]"),
        (b'{"prompt": "\xff"}\n', "line 1: not UTF-8"),
    ],
)
def test_a_broken_line_is_reported_with_its_number(tmp_path, word_tokenizer, content, words):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_prompts(path, tokenizer=word_tokenizer, settings=DataSettings(train=path))
    assert f"broken.jsonl, {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent.jsonl", "no such data file"), ("rows.csv", "unknown extension '.csv'; expected .jsonl or .parquet")],
)
def test_a_missing_file_or_unknown_extension_is_an_error(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        load_prompts(tmp_path / name, tokenizer=None, settings=DataSettings(train=tmp_path / name))


def test_a_broken_parquet_file_is_an_error(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"broken\.parquet: not a readable Parquet file"):
        load_prompts(path, tokenizer=None, settings=DataSettings(train=path))


def test_a_byte_order_mark_and_blank_lines_are_ignored(tmp_path, word_tokenizer):
    row = json.dumps({"prompt": "p", "label": 1})
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n{row}\n".encode())
    found = load_prompts(path, tokenizer=word_tokenizer, settings=DataSettings(train=path))
    assert [prompt.id for prompt in found.prompts] == ["marked:0", "marked:1"]


LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@given(lengths=LENGTHS, limit=st.integers(1, 6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_long_prompts_are_dropped_cut_or_refused(read, lengths, limit):
    rows = [{"prompt": " ".join("x" * (word + 1) for word in range(length)), "label": 1} for length in lengths]
    too_long = sum(length > limit for length in lengths)

    cut = read(rows, max_prompt_tokens=limit, long_prompts="truncate_left")
    assert cut.truncated == too_long
    for prompt, length in zip(cut.prompts, lengths, strict=True):
        assert prompt.token_ids == tuple(range(1, length + 1))[-limit:]
        assert len(prompt.text.split()) == len(prompt.token_ids)

    if too_long == len(lengths):
        assert f"all {too_long} prompts are longer than data.max_prompt_tokens: {limit}" in error_of(
            read, rows, max_prompt_tokens=limit
        )
    else:
        kept = read(rows, max_prompt_tokens=limit)
        assert [prompt.id for prompt in kept.prompts] == [f"rows:{i}" for i, n in enumerate(lengths) if n <= limit]
        assert kept.dropped == ({"too long": too_long} if too_long else {})

    if too_long:
        first = next(index for index, length in enumerate(lengths) if length > limit)
        message = error_of(read, rows, max_prompt_tokens=limit, long_prompts="error")
        assert f"line {first + 1}: the prompt has {lengths[first]} tokens; data.max_prompt_tokens is {limit}" in message


def test_duplicates_are_kept_by_default(read):
    rows = [{"prompt": "p", "label": 1}, {"prompt": "p", "label": 2}, {"prompt": "p", "label": 1}]
    assert len(read(rows).prompts) == 3
    found = read(rows, drop_duplicates=True)
    assert [prompt.label for prompt in found.prompts] == [1, 2]
    assert found.dropped == {"duplicate": 1}


def test_the_chat_template_is_applied_to_text_and_messages(read):
    texts = [p.text for p in read([{"prompt": "hello"}, {"prompt": MESSAGES}], template="chat").prompts]
    assert texts == ["<user> hello <assistant>", "<system> Be brief. <user> What is 2 + 2 ? <assistant>"]
