"""metrics.jsonl, the record of a run: one line a step; other sinks beside it if wanted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.observability.sinks import Sink
from megatron_rl.utils.files import atomically, write_error

FILE_NAME = "metrics.jsonl"

Row = dict[str, Any]
"""One line: `step` (int), `time` (unix seconds), and every metric as float or None."""


class MetricsLog:
    """Appends a line a call to `folder/metrics.jsonl`.

    keep_up_to_step: None for a new run, whose folder must not hold metrics yet (UserError). On resume, the step of the
    checkpoint: what the interrupted run wrote after it is dropped, so that no step appears twice; -1 drops everything.
    """

    def __init__(self, folder: Path, *, keep_up_to_step: int | None, sinks: Sequence[Sink] = ()) -> None:
        self._path = folder / FILE_NAME
        if keep_up_to_step is not None:
            _keep_lines(self._path, keep_up_to_step)
        elif self._path.exists():
            raise UserError(
                f"{self._path} already holds another run's metrics. Choose another run.name, or go on with resume=auto."
            )
        self._sinks = sinks

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line, on disk when this returns. NaN and infinity become null. Raises UserError on a full disk."""
        now = time.time()
        row = {"step": step, "time": round(now, 3)} | {name: _finite(value) for name, value in metrics.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew for every line: there is nothing to close or to lose when the run is killed.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        except OSError as error:
            raise write_error(self._path, error) from error
        known = {name: value for name, value in metrics.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, now, known)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def read_metrics(folder: Path) -> list[Row]:
    """All lines of a run in file order; none without a file. A torn last line (killed run, full disk) is left out.

    Errors: UserError for a broken line before the last.
    """
    return [row for row, _ in _read_lines(folder / FILE_NAME)]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric where it has a finite value, by rising step; a later line for a step wins."""
    by_step = {row["step"]: float(row[name]) for row in rows if _is_number(row.get(name))}
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Every metric that has a value somewhere, in order of first appearance."""
    seen = dict.fromkeys(name for row in rows for name, value in row.items() if _is_number(value))
    return [name for name in seen if name not in ("step", "time")]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _read_lines(path: Path) -> list[tuple[Row, str]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed: list[tuple[Row, str]] = []
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if index == len(lines) - 1:
                break
            raise UserError(f"{path}:{index + 1}: not a line of metrics. Delete that line and try again.") from error
        parsed.append((row, line))
    return parsed


def _keep_lines(path: Path, last_step: int) -> None:
    if path.exists():
        kept = [line + "\n" for row, line in _read_lines(path) if row["step"] <= last_step]
        with atomically(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
