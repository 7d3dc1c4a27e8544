from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.data.tokenizer import single_token, stop_token_ids
from megatron_rl.errors import UserError


class Tokenizer:
    """A tokenizer over a fixed vocabulary of words, in which 0 is the unknown token."""

    unk_token_id = 0
    vocabulary: tuple[str, ...] = ("<unk>", "no", "wait")

    def __init__(self, eos_token_id: int | None = None) -> None:
        self.eos_token_id = eos_token_id

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [self.vocabulary.index(word) if word in self.vocabulary else 0 for word in text.split()]


def test_a_text_of_one_token_gives_its_id() -> None:
    assert single_token(Tokenizer(), "wait", "here") == 2


@pytest.mark.parametrize(
    ("text", "words"), [("wait wait", r"2 tokens: \[2, 2\]"), ("", "0 tokens"), ("hold", "it is unknown")]
)
def test_a_text_that_is_not_one_known_token_is_an_error(text: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.probes\.p\.token: '{text}' must be one token .*{words}"):
        single_token(Tokenizer(), text, "evaluation.probes.p.token")


@pytest.mark.parametrize(
    ("chosen", "generation", "tokenizer", "expected"),
    [
        ([9], {"eos_token_id": 5}, 7, (9,)),
        (None, {"eos_token_id": 5}, 7, (5,)),
        (None, {"eos_token_id": [5, 6]}, 7, (5, 6)),
        (None, {"eos_token_id": 0}, 7, (0,)),
        (None, {}, 7, (7,)),
        (None, {"eos_token_id": []}, 7, (7,)),
        (None, None, 0, (0,)),
    ],
)
def test_stop_tokens_come_from_settings_then_generation_config_then_tokenizer(
    tmp_path: Path,
    chosen: list[int] | None,
    generation: dict[str, object] | None,
    tokenizer: int,
    expected: tuple[int, ...],
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_token_ids(Tokenizer(tokenizer), tmp_path, chosen) == expected


def test_a_model_without_an_end_token_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing ends a response.*rollout\.stop_token_ids"):
        stop_token_ids(Tokenizer(), tmp_path, None)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_damaged_generation_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json: "):
        stop_token_ids(Tokenizer(1), tmp_path, None)
