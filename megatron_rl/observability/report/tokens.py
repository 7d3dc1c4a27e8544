"""Rollout dumps as flat arrays, and token ids as text. T is the number of sampled tokens in one dump."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import read_parquet

Array = np.ndarray[Any, np.dtype[Any]]
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The sampled tokens of one dump. Values that the run did not record are NaN, and such flags are False."""

    step: int
    ids: Array
    """[T] int, token ids."""
    log_probs: Array
    """[T] log-probs in nats at the sampling temperature: of the actor before the update if recorded, else of the
    engine."""
    entropy: Array
    """[T] entropy in nats."""
    kept: Array
    """[T] bool: the token is in the proxy's filter (q > 0)."""
    selected: Array
    """[T] bool: the loss regularises the token."""
    advantages: Array
    """[T] advantage of the token's response."""


def read_tokens(step: int, path: Path) -> TokenTable:
    """Reads the sampled tokens of a dump. Raises UserError if the file is not a dump."""
    table = read_dump(path)
    sampled, lengths = _sampled(table), _lengths(table)

    def column(name: str) -> Array:
        return flat(table, name, len(sampled))[sampled]

    engine, actor = column("log_probs").astype(np.float64), column("actor_log_probs").astype(np.float64)
    return TokenTable(
        step=step,
        ids=column("token_ids").astype(np.int64),
        log_probs=np.where(np.isfinite(actor), actor, engine),
        entropy=column("entropy").astype(np.float64),
        kept=_flags(column("kept")),
        selected=_flags(column("selected")),
        advantages=np.repeat(np.asarray(table.column("advantage"), dtype=np.float64), lengths)[sampled],
    )


def read_ids(path: Path) -> Array:
    """Reads the ids [T] of a dump's sampled tokens. Raises UserError if the file is not a dump."""
    table = read_dump(path)
    return flat(table, "token_ids")[_sampled(table)]


def _lengths(table: pa.Table) -> Array:
    return table.column("token_ids").combine_chunks().value_lengths().to_numpy(zero_copy_only=False)


def _sampled(table: pa.Table) -> Array:
    """The mask of sampled tokens, response after response. Dumps of earlier versions have none: all were sampled."""
    mask = flat(table, "sampled_mask", int(_lengths(table).sum()))
    return np.ones(len(mask), dtype=bool) if mask.dtype != bool else mask


def read_candidates(path: Path) -> tuple[Array, Array]:
    """Reads the token ids and log-probs, [n] each, of all next-token candidates that were recorded at a step.

    Raises UserError if the file is not a dump.
    """
    table = read_dump(path, ["candidate_ids", "candidate_log_probs"])
    ids = flat(table, "candidate_ids").astype(np.int64)
    return ids[ids >= 0], flat(table, "candidate_log_probs").astype(np.float64)[ids >= 0]


def read_dump(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a dump as a table. Raises UserError if the file is not a dump."""
    try:
        return read_parquet(path, columns)
    except UserError as error:
        raise UserError(f"{path}: not a readable rollout dump ({error}). Move it out of the folder.") from error


def flat(table: pa.Table, name: str, length: int | None = None) -> Array:
    """Returns the values of a list column, response after response, or NaN of the given length if it is missing."""
    if name not in table.column_names and length is not None:
        return np.full(length, np.nan)
    return table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _flags(values: Array) -> Array:
    return np.nan_to_num(values.astype(np.float64)) > 0


class Vocabulary:
    """The texts of token ids, from the first tokenizer.json in the given folders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        from tokenizers import Tokenizer

        path = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)
        self._tokenizer = Tokenizer.from_file(str(path)) if path else None
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """Returns the text of a token, such as `#17` without a tokenizer."""
        if token not in self._texts:
            text = self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else ""
            self._texts[token] = text or (self._tokenizer and self._tokenizer.id_to_token(token)) or f"#{token}"
        return self._texts[token]

    def word(self, token: int) -> str:
        """Returns the text in the form of word classes: stripped and in lower case."""
        return self.text(token).strip().lower()

    @cached_property
    def known(self) -> bool:
        """Whether a tokenizer was found."""
        return self._tokenizer is not None


def class_of_tokens(ids: Array, vocabulary: Vocabulary, classes: Mapping[str, Sequence[str]]) -> Array:
    """Returns the index of each token's word class, [T], or -1 for a token in no class."""
    number = {word.lower(): index for index, words in enumerate(classes.values()) for word in words}
    distinct, inverse = np.unique(ids, return_inverse=True)
    of_distinct = np.array([number.get(vocabulary.word(int(token)), -1) for token in distinct], dtype=np.int64)
    return of_distinct[inverse] if len(distinct) else np.empty(0, dtype=np.int64)
