"""Rows of a .jsonl or .parquet file, one at a time, each with its position in the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import parse_json, read_lines
from megatron_rl.utils.parquet import check_batches

from .schemas import Row

_PARQUET_BATCH = 64
"""Rows that are read at a time. Few, because a row of a compressed file may have megabytes."""


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields ("line 7", row) or ("row 6", row). Lines count from 1, rows from 0, and blank lines are skipped.

    Raises UserError for a missing or unreadable file, an unknown extension, or a broken line.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: unknown extension {path.suffix!r}; expected {' or '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such data file")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8: {error.reason} (byte {error.start})") from error
        row = parse_json(text, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, {{...}}, found {text.strip()[:40]}")
        yield f"line {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        check_batches(path, _PARQUET_BATCH)
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
