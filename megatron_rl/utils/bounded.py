"""Reading what nobody vouches for: every reader ends within a bound of memory, and its error names the file."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from megatron_rl.errors import UserError
from megatron_rl.utils.parquet import check_whole

MOST_BYTES = 2**28
"""Largest JSON or text file, in bytes. The index of a model with 100,000 tensors has 10 MB."""
LONGEST_LINE = 2**28
"""Longest line of JSON, in bytes. Rows with the tests of a program take tens of megabytes."""


class OverBudget(ValueError):
    """The work takes more time or memory than it may."""


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; links are followed.

    Raises UserError for anything else: a pipe would block its reader, and a device may never end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: a plain file is expected, not a folder, pipe or device")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Returns the contents of a plain file. Raises UserError if the file is larger than `most` bytes."""
    with open_plain(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    if len(content) > most:
        raise UserError(f"{path}: larger than {most / 2**20:g} MiB, the most that such a file may have")
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Returns the text of a plain file. Raises UserError if it is too large or not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} (byte {error.start})") from error


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Returns the value of a JSON file. Raises UserError."""
    return parse_json(read_text(path, most), str(path))


def read_json_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Returns the object of a JSON file. Raises UserError for any other value too."""
    return parse_json_object(read_text(path, most), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Returns the value of a JSON text. Raises UserError that begins with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(f"{where}: JSON that Python cannot read: {error}") from error


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Returns the object of a JSON text. Raises UserError, that begins with `where`, for any other value too."""
    content = parse_json(text, where)
    if not isinstance(content, dict):
        raise UserError(f"{where}: a JSON object is expected, not {type(content).__name__}")
    return content


def read_lines(path: Path, longest: int = LONGEST_LINE) -> Iterator[tuple[int, bytes]]:
    """Yields number, from 1, and content of each line of a plain file, with the line end.

    Raises UserError for a line of more than `longest` bytes.
    """
    with open_plain(path) as file:
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise UserError(f"{path}, line {number}: longer than {longest / 2**20:g} MiB")
            yield number, line


def read_parquet(path: Path, columns: list[str] | None = None) -> Any:
    """Returns the `pyarrow.Table` of a Parquet file. Raises UserError, also as `parquet.check_whole` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_plain(path):
        pass
    try:
        check_whole(path, columns)
        return pq.ParquetFile(path, page_checksum_verification=True).read(columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


_ONE_AT_A_TIME = threading.RLock()
"""Two threads would each restore the limits that they found, and the last one might leave the other's for good."""


class _Late(BaseException):
    """The time is up. No handler of the work's own for ordinary exceptions catches this."""


@contextmanager
def budget(what: str, *, seconds: float, mebibytes: int) -> Iterator[None]:
    """Raises OverBudget if the block takes more processor time, or allocates more memory at a time.

    The memory is a limit on the growth of the address space of the whole process, so that one thread at a time has a
    budget. The time is bounded in the main thread only, which alone receives signals.
    """
    with _ONE_AT_A_TIME:
        yield from _within(what, seconds, mebibytes)


def _within(what: str, seconds: float, mebibytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + mebibytes * 2**20
    most = most if limits[0] == resource.RLIM_INFINITY else min(most, limits[0])
    timed = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGVTALRM, _raise_late) if timed else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        if timed and seconds < math.inf:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except MemoryError as error:
        raise OverBudget(f"{what} needs more than {mebibytes} MiB of memory") from error
    except _Late:
        raise OverBudget(f"{what} takes more than {seconds:g} s of processor time") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _raise_late(_number: int, _frame: FrameType | None) -> None:
    raise _Late


def _address_space() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
