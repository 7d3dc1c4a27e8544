"""Rollout dumps as flat arrays, and token ids as text. T: response tokens of one dump."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class TokenTable:
    """One dump. Values that the run did not record are NaN, flags that it did not record are False."""

    step: int
    ids: Array
    """[T] int"""
    log_probs: Array
    """[T] of the actor before the update where it looked, else of the engine; nats, at the sampling temperature."""
    entropy: Array
    """[T] nats"""
    kept: Array
    """[T] bool: q > 0."""
    selected: Array
    """[T] bool: the loss regularises this token."""
    advantages: Array
    """[T] of the token's response."""


def read_tokens(step: int, path: Path) -> TokenTable:
    """Raises UserError for a file that is no dump."""
    table = read_dump(path)
    ids = flat(table, "token_ids").astype(np.int64)
    engine = flat(table, "log_probs").astype(np.float64)
    actor = flat(table, "actor_log_probs", len(ids)).astype(np.float64)
    lengths = table.column("token_ids").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    return TokenTable(
        step=step,
        ids=ids,
        log_probs=np.where(np.isfinite(actor), actor, engine),
        entropy=flat(table, "entropy", len(ids)).astype(np.float64),
        kept=_flags(flat(table, "kept", len(ids))),
        selected=_flags(flat(table, "selected", len(ids))),
        advantages=np.repeat(np.asarray(table.column("advantage"), dtype=np.float64), lengths),
    )


def read_candidates(path: Path) -> tuple[Array, Array]:
    """Token ids and log-probs of all recorded next-token candidates of a step, [n] each. Errors as `read_dump`."""
    table = read_dump(path, ["candidate_ids", "candidate_log_probs"])
    ids = flat(table, "candidate_ids").astype(np.int64)
    return ids[ids >= 0], flat(table, "candidate_log_probs").astype(np.float64)[ids >= 0]


def read_dump(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Raises UserError for a file that is no dump."""
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable rollout dump ({error}). Move it out of the folder.") from error


def flat(table: pa.Table, name: str, length: int | None = None) -> Array:
    """A list column's values, response after response; NaN of the given length where there is no such column."""
    if name not in table.column_names and length is not None:
        return np.full(length, np.nan)
    return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _flags(values: Array) -> Array:
    return np.nan_to_num(values.astype(np.float64)) > 0


class Vocabulary:
    """Token ids as text, from the tokenizer.json that a run's folder, its export or its model holds."""

    def __init__(self, folders: Iterable[Path]) -> None:
        from tokenizers import Tokenizer

        path = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)
        self._tokenizer = Tokenizer.from_file(str(path)) if path else None
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """`#17` where there is no tokenizer."""
        if token not in self._texts:
            text = self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else ""
            self._texts[token] = text or (self._tokenizer and self._tokenizer.id_to_token(token)) or f"#{token}"
        return self._texts[token]

    def word(self, token: int) -> str:
        """The text as word classes name it: without the blanks around it, in lower case."""
        return self.text(token).strip().lower()

    @cached_property
    def known(self) -> bool:
        return self._tokenizer is not None


def class_of_tokens(ids: Array, vocabulary: Vocabulary, classes: Mapping[str, Sequence[str]]) -> Array:
    """[T] index of each token's word class, -1 for tokens of none."""
    number = {word.lower(): index for index, words in enumerate(classes.values()) for word in words}
    distinct, inverse = np.unique(ids, return_inverse=True)
    of_distinct = np.array([number.get(vocabulary.word(int(token)), -1) for token in distinct], dtype=np.int64)
    return of_distinct[inverse] if len(distinct) else np.empty(0, dtype=np.int64)
