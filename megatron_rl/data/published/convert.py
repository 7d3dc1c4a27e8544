"""Conversion of one row of a published file to a problem and its answer."""

from __future__ import annotations

import re
from typing import Any

from megatron_rl.data.schemas import Row, kind
from megatron_rl.utils.boxed import last_boxed

from .sets import Columns

# DAPO-Math-17k wraps each problem in a request for an `Answer:` line, which a verifier that reads boxes ignores.
_WRAPPING = re.compile(
    r"\A\s*Solve the following math problem step by step\.[^\n]*\n+(?P<problem>.*?)"
    r'\s*Remember to put your answer on its own line after "Answer:"\.?\s*\Z',
    re.DOTALL,
)
_INLINE_MATHS = re.compile(r"\$([^$]*)\$")


def problem_of(row: Row, columns: Columns) -> str:
    """Returns the problem without any surrounding request. Raises ValueError with the column."""
    value = row.get(columns.problem)
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        value = "\n".join(str(message.get("content", "")) for message in value)
    if not isinstance(value, str):
        raise ValueError(f"column {columns.problem}: expected text, found {kind(value)}")
    wrapped = _WRAPPING.match(value)
    text = (wrapped["problem"] if wrapped else value).strip()
    if not text:
        raise ValueError(f"column {columns.problem}: the problem is empty")
    text.encode()  # raises ValueError for lone surrogates, which JSON allows and parquet does not
    return text


def answer_of(row: Row, columns: Columns) -> str:
    """Returns the answer as LaTeX or as the text of a number. Raises ValueError with the column."""
    column, _, field = columns.answer.partition(".")
    value = row.get(column)
    if field:
        if not isinstance(value, dict):
            raise ValueError(f"column {column}: expected {{{field}: ...}}, found {kind(value)}")
        value = value.get(field)
    text = _as_text(value, columns.answer)
    if columns.boxed:
        boxed = last_boxed(text)
        if boxed is None:
            raise ValueError(rf"column {columns.answer}: there is no \boxed{{}} in {text[-60:]!r}")
        text = boxed.strip()
    if not text:
        raise ValueError(f"column {columns.answer}: the answer is empty")
    text.encode()
    return text


def _as_text(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | list) or value == []:
        raise ValueError(f"column {column}: expected text or a number, found {kind(value)}")
    if not isinstance(value, list):
        return str(value).strip()
    if not all(isinstance(part, str) for part in value):
        raise ValueError(f"column {column}: expected a list of texts, found {value!r:.60}")
    # In OlympiadBench, several answers form one list, each between dollar signs.
    return ", ".join(_INLINE_MATHS.sub(r"\1", part).strip() for part in value)


def extras_of(row: Row, columns: Columns) -> dict[str, Any]:
    """Returns the other columns that are kept: short ones with the origin and the difficulty of a problem."""
    kept = ("id", "ID", "unique_id", "problem_idx", "idx", "subject", "subfield", "level", "type", "url", "answer_type")
    return {name: row[name] for name in kept if name not in columns.needed and row.get(name) is not None}
