from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.config.schema import DataSettings
from megatron_rl.data.prompts import PromptSet, load_prompts


class WordTokenizer:
    """A tokenizer with one token per word, whose id is the number of letters."""

    chat_template = "yes"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [len(word) for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join("x" * length for length in token_ids)

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        assert add_generation_prompt and not tokenize
        return " ".join(f"<{message['role']}> {message['content']}" for message in conversation) + " <assistant>"


@pytest.fixture
def word_tokenizer() -> WordTokenizer:
    return WordTokenizer()


Read = Callable[..., PromptSet]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Returns a function that writes rows to a JSONL or Parquet file and loads its prompts."""

    def write_and_read(
        rows: list[Any], *, name: str = "rows.jsonl", tokenizer: Any = None, **settings: Any
    ) -> PromptSet:
        path = tmp_path / name
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = tokenizer or WordTokenizer()
        return load_prompts(path, tokenizer=tokenizer, settings=DataSettings(train=path, **settings))

    return write_and_read
