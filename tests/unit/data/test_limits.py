"""Rows that a model or a verifier cannot use are found when the file is read, with their place."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_rl.config.reward import RewardSettings
from megatron_rl.config.schema import DataSettings
from megatron_rl.data.limits import Limits
from megatron_rl.data.prompts import load_prompts
from megatron_rl.errors import UserError
from megatron_rl.reward.labels import label_check
from megatron_rl.types import Prompt
from tests.unit.data.conftest import Read

GOOD = {"prompt": "a bb ccc", "label": "3"}
MEDIA: list[dict[str, Any]] = [
    {"images": [{"bytes": b"x".hex(), "path": None}]},
    {"images": ["figure.png"]},
    {"image": "figure.png"},
    {"image": {"bytes": None, "path": "figure.png"}},
    {"figure": {"bytes": "00", "path": None}},
    {"figures": [{"bytes": "00", "path": "a.png"}]},
    {"videos": ["a.mp4"]},
    {"audio": {"path": "a.wav", "bytes": None}},
    {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
]


@pytest.mark.parametrize("row", MEDIA, ids=str)
def test_pictures_are_refused_with_their_row(read: Read, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl, line 2: column \w+: the row has a picture"):
        read([GOOD, GOOD | row])


@pytest.mark.parametrize(
    "columns",
    [
        {"images": []},
        {"image": None},
        {"images": ""},
        {"extra": {"path": "a", "split": "b"}},
        {"extra": {"type": "text"}},
    ],
    ids=str,
)
def test_columns_without_a_picture_are_accepted(read: Read, columns: dict[str, Any]) -> None:
    assert len(read([GOOD | columns, GOOD]).prompts) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_check_names_the_row(read: Read, name: str, tmp_path: Any, word_tokenizer: Any) -> None:
    read([GOOD, GOOD | {"prompt": "a bb ccc dddd"}], name=name)
    path = tmp_path / name
    place = "line 2" if path.suffix == ".jsonl" else "row 1"
    for limits, words in (
        (Limits(4, 100, 10, "k"), "the prompt has the token id 4, but the model has 4 token ids"),
        (
            Limits(5, 13, 10, "k"),
            "the prompt has 4 tokens, and with k: 10 the sequence may have 14, .* 13 positions",
        ),
    ):
        with pytest.raises(UserError, match=f"{re.escape(str(path))}, {place}: {words}"):
            load_prompts(path, tokenizer=word_tokenizer, settings=DataSettings(train=path), check=limits.check)
    fitting = Limits(5, 14, 10, "k")
    assert load_prompts(path, tokenizer=word_tokenizer, settings=DataSettings(train=path), check=fitting.check)


TESTS = '{"inputs": ["1"], "outputs": ["2"]}'
LABELS = {
    "math": (["3", 3, -2.5, "\\boxed{x}", "x+1"], [["3"], [], "", "  ", True, None, {}, float("nan"), float("inf")]),
    "countdown": (["1 2 3 > 6"], ["1 2 3", 6, None, "", True, ["1 2 3 > 6"]]),
    "code": (
        [TESTS, ["assert True"], {"tests": "assert True"}],
        ["", "3", None, True, [], {}, "{", [1], '{"inputs": []}'],
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_judged_as_the_verifier_reads_them(name: str) -> None:
    check = label_check(RewardSettings(name=name))
    assert check
    right, wrong = LABELS[name]
    for label in right:
        check(Prompt("a:0", (1,), "?", label))
    for label in wrong:
        with pytest.raises(ValueError, match="label"):
            check(Prompt("a:0", (1,), "?", label))


def test_labels_of_ones_own_reward_are_not_judged() -> None:
    assert label_check(RewardSettings(name="mine:score")) is None
