"""Conversion of published files to one parquet file (prompt, label, id, extra), with a report of dropped rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.data.rows import read_rows
from megatron_rl.data.schemas import Row
from megatron_rl.errors import UserError
from megatron_rl.utils.files import atomically

from .convert import answer_of, extras_of, problem_of
from .sets import SETS, Columns, PublishedSet

METADATA_KEY = b"megatron_rl"
TooLong = Callable[[str], bool]
PlacedRows = Iterable[tuple[str, Row]]


@dataclass(frozen=True)
class Source:
    """A source file that was read."""

    name: str
    sha256: str
    known_as: str | None
    """Name of the published file with this checksum, if it is known."""
    rows: int
    """Number of rows in the file."""


@dataclass
class Prepared:
    """The report of a conversion."""

    title: str
    sources: list[Source] = field(default_factory=list)
    kept: int = 0
    """Number of problems in the result."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped rows by reason: duplicate, contradictory answers, too long."""
    example: tuple[str, str] = ("", "")
    """The first problem and its answer."""


@dataclass
class _Problem:
    source: str
    index: int
    answer: str
    extras: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    contradicted: bool = False


def prepare(
    name: str,
    sources: list[Path],
    out: Path,
    *,
    problems: int | None = None,
    sha256: list[str] | None = None,
    too_long: TooLong = lambda problem: False,
    watch: Callable[[PlacedRows, str], PlacedRows] = lambda rows, name: rows,
) -> Prepared:
    """Converts published files and writes `out`. Nothing is written if an error occurs.

    Args:
        name: name of the set, a key of `SETS`.
        sources: published files, read in this order.
        problems: expected number of distinct problems; None accepts the published number.
        sha256: checksums that the sources must have, in the same order; None only records the checksums.
        too_long: returns whether a problem is left out because of its length.
        watch: wraps the rows of a file, for example to show progress.

    Raises:
        UserError: a file, row or column differs from the published form, or the number of problems or a checksum is
            not the expected one.
    """
    published = _find(name)
    report = Prepared(published.title)
    found: dict[str, _Problem] = {}
    for number, path in enumerate(sources):
        digest = _sha256(path)
        if sha256 is not None and (len(sha256) != len(sources) or sha256[number] != digest):
            raise UserError(f"{path}: its SHA-256 is {digest}, not as given by --sha256 (give one per --source)")
        rows = 0
        for place, index, row, columns in _rows(watch(read_rows(path), path.name), path, published):
            rows += 1
            try:
                _add(found, _Problem(path.stem, index, answer_of(row, columns)), row, columns)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from error
        report.sources.append(Source(path.name, digest, published.checksums.get(digest), rows))
    _check_number(len(found), published, problems, sources)
    kept = _select(found, report, too_long)
    _write(out, name, kept, report)
    return report


def _find(name: str) -> PublishedSet:
    if name not in SETS:
        raise UserError(f"unknown set {name!r}; known: {', '.join(SETS)}")
    return SETS[name]


def _rows(placed: PlacedRows, path: Path, published: PublishedSet) -> Iterator[tuple[str, int, Row, Columns]]:
    columns: Columns | None = None
    for index, (place, row) in enumerate(placed):
        columns = columns or _form(list(row), published, f"{path}, {place}")
        for needed in columns.needed:
            if needed not in row:
                raise UserError(f"{path}, {place}: column {needed}: missing, though the rows before have it")
        yield f"{path}, {place}", index, row, columns
    if columns is None:
        raise UserError(f"{path}: there are no rows in this file")


def _form(names: list[str], published: PublishedSet, place: str) -> Columns:
    for columns in published.forms:
        if set(columns.needed) <= set(names):
            return columns
    expected = "; or ".join(" and ".join(columns.needed) for columns in published.forms)
    raise UserError(
        f"{place}: the columns are {', '.join(names)}; {published.title} has {expected}. Published as {published.where}"
    )


def _add(found: dict[str, _Problem], new: _Problem, row: Row, columns: Columns) -> None:
    text = problem_of(row, columns)
    known = found.setdefault(text, new)
    if known is new:
        new.extras = extras_of(row, columns)
        return
    known.rows += 1
    known.contradicted |= known.answer != new.answer


def _check_number(count: int, published: PublishedSet, problems: int | None, sources: list[Path]) -> None:
    least, most = (problems, problems) if problems is not None else published.problems
    if not least <= count <= most:
        expected = f"{least}" if least == most else f"{least} to {most}"
        names = ", ".join(str(path) for path in sources)
        raise UserError(
            f"{names}: {count} distinct problems; {published.title} has {expected}. Is a --source missing or from "
            f"another set? To accept this number, give --problems {count}. Published as {published.where}"
        )


def _select(found: dict[str, _Problem], report: Prepared, too_long: TooLong) -> dict[str, _Problem]:
    kept = {}
    for text, problem in found.items():
        if problem.contradicted:
            report.dropped["contradictory answers"] += problem.rows
            continue
        report.dropped["duplicate"] += problem.rows - 1
        if too_long(text):
            report.dropped["too long"] += 1
            continue
        kept[text] = problem
    report.dropped = +report.dropped
    if not kept:
        raise UserError(f"every problem of {report.title} was dropped: {dict(report.dropped)}")
    report.kept = len(kept)
    first = next(iter(kept))
    report.example = first, kept[first].answer
    return kept


def _write(out: Path, name: str, kept: dict[str, _Problem], report: Prepared) -> None:
    import pyarrow
    import pyarrow.parquet

    if out.suffix != ".parquet":
        raise UserError(f"--output {out}: the name must end in .parquet")
    table = pyarrow.table(
        {
            "prompt": list(kept),
            "label": [problem.answer for problem in kept.values()],
            "id": [f"{name}:{problem.source}:{problem.index}" for problem in kept.values()],
            "extra": [json.dumps(problem.extras, ensure_ascii=False, default=str) for problem in kept.values()],
        }
    )
    sources = [vars(source) for source in report.sources]
    about = {"set": name, "sources": sources, "kept": report.kept, "dropped": dict(report.dropped)}
    with atomically(out) as partial:
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), partial, compression="zstd"
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
