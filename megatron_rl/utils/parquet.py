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

MOST_BYTES = 2**33
"""Most bytes of a file that is read whole, and of the lists of numbers in a row group that is read in batches."""
MOST_OF_BATCH = 2**30
"""Most bytes of text in a batch of rows."""
MOST_RATIO = 200
"""How many times its compressed size a row group of more than MOST_OF_BATCH may take. Ordinary texts take 2 to 20."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12, "BYTE_ARRAY": 4}
"""Bytes of a value in memory; of a text, those of its offset."""
_DICTIONARY_PAGE = 2
_AT_A_TIME = 2**16
"""Rows that are measured at a time. Many, because Arrow copies the dictionary for each batch."""


def check_whole(path: Path, columns: list[str] | None = None) -> None:
    """Raises UserError if the columns of a Parquet file, all by default, take more than MOST_BYTES of memory.

    The sizes of compressed pages are those that the file's footer states.
    """
    import pyarrow.parquet as pq

    with path.open("rb") as file, pq.ParquetFile(file) as parquet:
        total = 0
        for group in range(parquet.num_row_groups):
            for chunk, schema in _chunks(parquet.metadata, group):
                if columns is None or schema.path.partition(".")[0] in columns:
                    size = max(0, chunk.total_uncompressed_size, chunk.num_values * _width(schema))
                    if largest := _largest_text(file, chunk):
                        size += largest * chunk.num_values
                        if total + size > MOST_BYTES:
                            size = sum(_texts(file, group, schema.path))
                    total += size
                if total > MOST_BYTES:
                    raise UserError(f"{path}: its values take more than {MOST_BYTES >> 20} MiB, the most that is read")


def check_batches(path: Path, rows: int) -> None:
    """Raises UserError if some batch of `rows` rows stands for more than MOST_OF_BATCH bytes of text, if the numbers of
    a row group's lists take more than MOST_BYTES, or if a row group is compressed beyond MOST_RATIO.

    The sizes of compressed pages are those that the file's footer states.
    """
    import pyarrow.parquet as pq

    with path.open("rb") as file, pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            chunks = list(_chunks(parquet.metadata, group))
            size = sum(chunk.total_uncompressed_size for chunk, _ in chunks)
            packed = sum(chunk.total_compressed_size for chunk, _ in chunks)
            numbers = sum(chunk.num_values * _width(schema) for chunk, schema in chunks if _repeats(schema))
            if numbers > MOST_BYTES or (size > MOST_OF_BATCH and size > MOST_RATIO * packed):
                raise _refusal(path)
            for chunk, schema in chunks:
                count = chunk.num_values if _repeats(schema) else min(rows, chunk.num_values)
                if _largest_text(file, chunk) * count > MOST_OF_BATCH and any(
                    size > MOST_OF_BATCH for size in _texts(file, group, schema.path, rows)
                ):
                    raise _refusal(path)


def _refusal(path: Path) -> UserError:
    return UserError(
        f"{path}: its rows stand for far more than the file has: over {MOST_OF_BATCH >> 20} MiB of text in a few rows, "
        f"lists of over {MOST_BYTES >> 20} MiB, or {MOST_RATIO} times its compressed size. If the rows are real, write "
        "the file again with smaller row groups (row_group_size=1000)"
    )


def _chunks(metadata: Any, group: int) -> Iterator[tuple[Any, Any]]:
    for number in range(metadata.num_columns):
        yield metadata.row_group(group).column(number), metadata.schema.column(number)


def _repeats(schema: Any) -> bool:
    return bool(schema.max_repetition_level)


def _width(schema: Any) -> int:
    return int(_WIDTHS.get(schema.physical_type) or schema.length)


def _largest_text(file: Any, chunk: Any) -> int:
    """Returns an upper bound of the bytes of a text of the column's dictionary; 0 without a dictionary.

    The bound is the size of the dictionary's page, from the head of that page, which the reader goes by. In the
    encoding DELTA_BYTE_ARRAY a text repeats a part of the last one, so that it may be as long as the column.
    """
    if chunk.physical_type != "BYTE_ARRAY":
        return 0
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return int(chunk.total_uncompressed_size)
    file.seek(min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0))
    kind, size = _head_of_page(file.read(32))
    return size if kind == _DICTIONARY_PAGE else 0


def _head_of_page(head: bytes) -> tuple[int, int]:
    """Returns kind and uncompressed size of a page: fields 1 and 2 of PageHeader (parquet.thrift), in Thrift's compact
    protocol. Each is a byte 0x15 and a number, 7 bits a byte, zigzag."""
    numbers, rest = [], iter(head)
    for _ in range(2):
        if next(rest, None) != 0x15:
            raise OSError("the head of a page is broken")
        value = shift = 0
        for byte in rest:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value >> 1)
    return numbers[0], numbers[1]


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
