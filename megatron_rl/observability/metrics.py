"""metrics.jsonl, the record of a run with one line per step, and the forwarding of metrics to other sinks."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.manifest import Written
from megatron_rl.errors import UserError
from megatron_rl.observability.sinks import Sink
from megatron_rl.utils.bounded import open_plain, read_lines
from megatron_rl.utils.files import atomically, write_error

FILE_NAME = "metrics.jsonl"

LONGEST_LINE = 2**24
"""Longest line, in bytes."""
LARGEST_STEP = 10**9
LATEST = 253402300799
"""The last second of the year 9999, the last that Python's calendar knows."""
Row = dict[str, Any]
"""One line: `step` (int), `time` (Unix seconds), and every metric as float or None."""


class MetricsLog:
    """Appends one line per call of `write` to `folder/metrics.jsonl`.

    Args:
        keep_up_to_step: None for a new run. On resume, the step of the checkpoint: lines that the interrupted run wrote
            for later steps are dropped, so that no step appears twice. -1 drops everything.

    Raises:
        UserError: `keep_up_to_step` is None, but the folder already holds metrics.
    """

    def __init__(self, folder: Path, *, keep_up_to_step: int | None, sinks: Sequence[Sink] = ()) -> None:
        self._path = folder / FILE_NAME
        if keep_up_to_step is not None:
            _keep_lines(self._path, keep_up_to_step)
        elif self._path.exists():
            raise UserError(
                f"{self._path} already holds metrics of another run. Choose another run.name, or continue that run "
                "with resume=auto."
            )
        self._sinks = sinks
        self._bytes, self._hash = 0, hashlib.sha256()
        if self._path.exists():
            with self._path.open("rb") as file:
                self._hash, self._bytes = hashlib.file_digest(file, "sha256"), file.tell()

    @property
    def written(self) -> Written:
        """What this run has written so far."""
        return Written(self._bytes, self._hash.hexdigest())

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Appends one line, which is on disk when this returns. NaN and infinity become null.

        Raises UserError if the line cannot be written, for example because the disk is full.
        """
        now = time.time()
        row = {"step": step, "time": round(now, 3)} | {name: _finite(value) for name, value in metrics.items()}
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The file is opened for every line, so that nothing is lost if the run is killed.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise write_error(self._path, error) from error
        self._bytes += len(line)
        self._hash.update(line.encode())
        known = {name: value for name, value in metrics.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, now, known)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def read_metrics(folder: Path) -> list[Row]:
    """Returns all lines of a run in file order, or an empty list without a file.

    An incomplete last line (killed run, full disk) is ignored. Raises UserError for a broken line before the last.
    """
    return [row for row, _ in _read_lines(folder / FILE_NAME)]


def is_unchanged(folder: Path, written: Written) -> bool:
    """Returns whether a run's metrics still begin with what the run had written."""
    path = folder / FILE_NAME
    if not path.is_file():
        return not written.bytes
    with open_plain(path) as file:
        return hashlib.sha256(file.read(written.bytes)).hexdigest() == written.sha256


def has_metrics(row: Row, metrics: Mapping[str, float | None]) -> bool:
    """Returns whether a line has these values. Times do not count: a line may be written later than they are."""
    return all(row.get(name, "") == _finite(value) for name, value in metrics.items() if not name.startswith("perf/"))


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and the finite values of one metric by ascending step.

    If a step has several lines, the last one counts.
    """
    by_step = {row["step"]: float(row[name]) for row in rows if _is_number(row.get(name))}
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Returns every metric that has a finite value in some row, in order of first appearance."""
    seen = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    return [name for name in seen if name not in ("step", "time")]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _read_lines(path: Path) -> list[tuple[Row, str]]:
    if not path.exists():
        return []
    parsed: list[tuple[Row, str]] = []
    broken = 0
    for number, content in read_lines(path, LONGEST_LINE):
        if broken:
            break
        line = content.decode("utf-8", errors="replace").rstrip("\r\n")
        try:
            parsed.append((_row(line), line))
        except (ValueError, KeyError, TypeError, RecursionError):
            broken = number  # an error, unless it is the last line, which a killed run left incomplete
    else:
        return parsed
    raise UserError(f"{path}:{broken}: not a line of metrics. Delete the line and try again.")


def _row(line: str) -> Row:
    """Returns the content of a line. Raises ValueError, KeyError, TypeError or RecursionError."""
    row = json.loads(line)
    step, moment = row["step"], row.get("time", 0)
    if not (_is_number(step) and 0 <= step <= LARGEST_STEP and int(step) == step):
        raise ValueError("the step is no step")
    if not (_is_number(moment) and 0 <= moment <= LATEST):
        raise ValueError("the time is no time")
    return {**row, "step": int(step)}


def _keep_lines(path: Path, last_step: int) -> None:
    if path.exists():
        kept = [line + "\n" for row, line in _read_lines(path) if row["step"] <= last_step]
        with atomically(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
