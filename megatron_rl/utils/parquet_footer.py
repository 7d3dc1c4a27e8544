"""The footer of a Parquet file, as parquet.thrift describes it, in Thrift's compact protocol. Standard library only.

pyarrow shows the same numbers, but ends the process if a forged footer has statistics of the wrong size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

DELTA_BYTE_ARRAY = 7
_DICTIONARY_PAGE = 2
_DOUBLE = 8
Struct = dict[int, Any]
"""Number of a field -> its value."""


@dataclass(frozen=True)
class Chunk:
    """The values of one column in one row group."""

    encodings: list[int]
    values: int
    unpacked: int
    """Bytes of the pages without compression, encoded."""
    packed: int
    start: int
    """Offset of the first page in the file."""


def read_footer(file: BinaryIO) -> list[list[Chunk]]:
    """Returns the chunks of each row group. Raises OSError for a broken footer."""
    end = file.seek(0, 2)
    file.seek(max(0, end - 8))
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(0, end - 8 - length))
    try:
        groups = _Reader(file.read(length)).struct()[4]
        return [[_chunk(column[3]) for column in group[1]] for group in groups]
    except (KeyError, IndexError, TypeError, RecursionError) as error:
        raise OSError(f"the footer is broken: {error!r}") from error


def dictionary_bytes(file: BinaryIO, chunk: Chunk) -> int:
    """Returns the uncompressed size of a chunk's dictionary; 0 if there is none. Raises OSError for a broken page."""
    file.seek(max(0, chunk.start))
    try:
        head = _Reader(file.read(2**16)).numbers(2)
    except (IndexError, TypeError, RecursionError) as error:
        raise OSError(f"the head of a page is broken: {error!r}") from error
    return max(0, head[1]) if head[0] == _DICTIONARY_PAGE else 0


def _chunk(column: Struct) -> Chunk:
    pages = [offset for offset in (column[9], column.get(11)) if offset]
    return Chunk(list(column[2]), max(0, column[5]), max(0, column[6]), max(0, column[7]), min(pages, default=0))


class _Reader:
    """Reads values one after another. Running out of bytes raises IndexError."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> Struct:
        return dict(self._fields())

    def numbers(self, count: int) -> list[int]:
        """Returns the first fields of a struct, which are numbers; of those that are missing, 0."""
        found = dict(zip(range(count), self._fields(), strict=False))
        values = dict(found.values())
        return [int(values.get(number + 1, 0)) for number in range(count)]

    def _fields(self) -> Iterator[tuple[int, Any]]:
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            yield number, head & 15 == 1 if head & 15 in (1, 2) else self._value(head & 15)

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):  # in a list, a truth value is a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 8):
            return self._skip(_DOUBLE if kind == 7 else self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise TypeError(f"a value of the unknown kind {kind}")

    def _skip(self, length: int) -> None:
        self._at += length

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
