"""Bounds of Parquet files, from their own statements, before their values are read.

A kilobyte of Parquet can stand for gigabytes: a text stands once in a dictionary and is named a million times, a list
of equal numbers is a count, and zeros compress to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.utils.parquet_footer import DELTA_BYTE_ARRAY, Chunk, dictionary_bytes, read_footer

MOST_BYTES = 2**33
"""Most bytes of a file that is read whole, and of the lists of numbers in a row group that is read in batches."""
MOST_OF_BATCH = 2**30
"""Most bytes of text in a batch of rows."""
MOST_RATIO = 200
"""How many times its compressed size a row group of more than MOST_OF_BATCH may take. Ordinary texts take 2 to 20."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12, "BYTE_ARRAY": 4}
"""Bytes of a value in memory; of a text, those of its offset."""
_AT_A_TIME = 2**16
"""Rows that are measured at a time. Many, because Arrow copies the dictionary for each batch."""


def check_whole(path: Path, columns: list[str] | None = None) -> None:
    """Raises UserError if the columns of a Parquet file, all by default, take more than MOST_BYTES of memory.

    The sizes of compressed pages are those that the file's footer states.
    """
    with path.open("rb") as file:
        total = 0
        for group, chunks in enumerate(_chunks(file)):
            for chunk, column in chunks:
                if columns is None or column.path.partition(".")[0] in columns:
                    size = max(chunk.unpacked, chunk.values * _width(column))
                    if largest := _largest_text(file, chunk, column):
                        size += largest * chunk.values
                        if total + size > MOST_BYTES:
                            size = sum(_texts(file, group, column.path))
                    total += size
                if total > MOST_BYTES:
                    raise UserError(f"{path}: its values take more than {MOST_BYTES >> 20} MiB, the most that is read")


def check_batches(path: Path, rows: int) -> None:
    """Raises UserError if some batch of `rows` rows stands for more than MOST_OF_BATCH bytes of text, if the numbers of
    a row group's lists take more than MOST_BYTES, or if a row group is compressed beyond MOST_RATIO.

    The sizes of compressed pages are those that the file's footer states.
    """
    with path.open("rb") as file:
        for group, chunks in enumerate(_chunks(file)):
            size, packed = sum(chunk.unpacked for chunk, _ in chunks), sum(chunk.packed for chunk, _ in chunks)
            numbers = sum(chunk.values * _width(column) for chunk, column in chunks if _repeats(column))
            if numbers > MOST_BYTES or (size > MOST_OF_BATCH and size > MOST_RATIO * packed):
                raise _refusal(path)
            for chunk, column in chunks:
                count = chunk.values if _repeats(column) else min(rows, chunk.values)
                if _largest_text(file, chunk, column) * count > MOST_OF_BATCH and any(
                    size > MOST_OF_BATCH for size in _texts(file, group, column.path, rows)
                ):
                    raise _refusal(path)


def _refusal(path: Path) -> UserError:
    return UserError(
        f"{path}: its rows stand for far more than the file has: over {MOST_OF_BATCH >> 20} MiB of text in a few rows, "
        f"lists of over {MOST_BYTES >> 20} MiB, or {MOST_RATIO} times its compressed size. If the rows are real, write "
        "the file again with smaller row groups (row_group_size=1000)"
    )


def _chunks(file: Any) -> list[list[tuple[Chunk, Any]]]:
    """Returns the chunks of each row group with their columns. Raises errors as pyarrow does, or OSError."""
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(file).schema
    columns, groups = [schema.column(number) for number in range(len(schema))], read_footer(file)
    if any(len(group) != len(columns) for group in groups):
        raise OSError("a row group has other columns than the file")
    return [list(zip(group, columns, strict=True)) for group in groups]


def _repeats(column: Any) -> bool:
    return bool(column.max_repetition_level)


def _width(column: Any) -> int:
    return int(_WIDTHS.get(column.physical_type) or column.length)


def _largest_text(file: Any, chunk: Chunk, column: Any) -> int:
    """Returns an upper bound of the bytes of a text of the column's dictionary; 0 without a dictionary.

    The bound is the size of the dictionary's page, from the head of that page, which the reader goes by. In the
    encoding DELTA_BYTE_ARRAY a text repeats a part of the last one, so that it may be as long as the column.
    """
    if column.physical_type != "BYTE_ARRAY":
        return 0
    return chunk.unpacked if DELTA_BYTE_ARRAY in chunk.encodings else dictionary_bytes(file, chunk)


def _texts(file: Any, group: int, column: str, rows: int = _AT_A_TIME) -> Iterator[int]:
    """Yields the bytes of a text column in each `rows` rows. The texts stay in their dictionary meanwhile.

    Texts that cannot be measured in this way count as endless: those of DELTA_BYTE_ARRAY, and over 2 GiB of others.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.seek(0)
    with_dictionary = pq.ParquetFile(file, read_dictionary=[column])
    try:
        for batch in with_dictionary.iter_batches(_AT_A_TIME, row_groups=[group], columns=[column]):
            for start in range(0, len(batch), rows):
                yield _bytes_of_texts(batch.column(0).slice(start, rows))
    except (OSError, pa.ArrowCapacityError) as error:
        if isinstance(error, OSError) and "Not yet implemented" not in str(error):
            raise
        yield sys.maxsize


def _bytes_of_texts(values: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        lengths = pc.binary_length(values.dictionary).cast(pa.int64())
        return pc.sum(lengths.take(values.indices)).as_py() or 0
    if pa.types.is_struct(values.type):
        return sum(map(_bytes_of_texts, values.flatten()))
    return _bytes_of_texts(values.flatten()) if hasattr(values, "flatten") else int(values.nbytes)
