"""The state of a run for `status` and `view`, and the driver's log: what the progress view shows, kept in files.

`state.json` has the phase of a run in progress, and how an ended run has ended. `logs/driver.log` has the plain lines
of the view with times, warnings of the libraries, and the error that ended the run.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import psutil
from pydantic import Field, TypeAdapter, ValidationError

from megatron_rl.errors import UserError
from megatron_rl.observability.metrics import LARGEST_STEP, LATEST, LONGEST_LINE, Row, read_metrics, series
from megatron_rl.observability.view import Metrics, PlainView, View
from megatron_rl.utils.bounded import read_bytes
from megatron_rl.utils.files import atomically
from megatron_rl.utils.format import duration, number
from megatron_rl.utils.sealed import is_intact, sealed

FILE_NAME, LOG = "state.json", "logs/driver.log"
RECENT_STEPS = 50


@dataclass(frozen=True, slots=True)
class State:
    """The state of a run. Times are in Unix seconds."""

    total_steps: Annotated[int, Field(ge=0, le=LARGEST_STEP)]
    phase: str
    since: Annotated[float, Field(ge=0, le=LATEST)]
    """Time at which the phase began."""
    pid: Annotated[int, Field(ge=0, le=2**22)]
    host: str
    step: Annotated[int, Field(ge=0, le=LARGEST_STEP)] = 0
    ended: str | None = None
    """How the run has ended; None while it is in progress."""


class KeptView(View):
    """Shows everything through another view, and keeps state and log in the run's folder once the run has one."""

    def __init__(self, view: View, folder: Path, total_steps: int, title: str) -> None:
        self._view, self._folder = view, folder
        self._state = State(total_steps, "starting", time.time(), os.getpid(), socket.gethostname())
        self._title = title
        self._log: PlainView | None = None
        self._handler: logging.Handler | None = None

    def open(self) -> None:
        """Begins to keep files. The run's folder must exist."""
        path = self._folder / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = PlainView(self._state.total_steps, self._title, _TimedLines(path))
        self._log.message(f"{self._title}: {self._state.total_steps} steps, process {self._state.pid}")
        self._handler = logging.FileHandler(path)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handler.setLevel(logging.WARNING)
        logging.getLogger().addHandler(self._handler)
        self._write()

    def __enter__(self) -> Self:
        self._view.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._log:
                self._state = replace(self._state, ended=_ending(self._state, error), since=time.time())
                if error is not None:
                    self._log.message("".join(traceback.format_exception(error)).rstrip())
                self._log.message(self._state.ended or "")
                self._write()
        finally:
            if self._handler:
                logging.getLogger().removeHandler(self._handler)
                self._handler.close()
            self._view.__exit__(kind, error, trace)

    def history(self, rows: Sequence[Row]) -> None:
        self._view.history(rows)
        self._state = replace(self._state, step=max((row["step"] for row in rows), default=0))

    def phase(self, name: str) -> None:
        self._view.phase(name)
        self._state = replace(self._state, phase=name, since=time.time())
        if self._log:
            self._log.phase(name)
            self._write()

    def warm_start(self, step: int, total: int, loss: float, seconds_left: float | None) -> None:
        self._view.warm_start(step, total, loss, seconds_left)
        if self._log:
            self._log.warm_start(step, total, loss, seconds_left)

    def step(self, step: int, metrics: Metrics) -> None:
        self._view.step(step, metrics)
        self._state = replace(self._state, step=step)
        if self._log:
            self._log.step(step, metrics)

    def eval(self, step: int, metrics: Metrics) -> None:
        self._view.eval(step, metrics)
        if self._log:
            self._log.eval(step, metrics)

    def message(self, text: str) -> None:
        self._view.message(text)
        if self._log:
            self._log.message(text)

    def _write(self) -> None:
        with atomically(self._folder / FILE_NAME) as partial:
            partial.write_bytes(sealed(json.dumps(asdict(self._state), indent=1).encode()) + b"\n")


class _TimedLines:
    """A text stream that puts the time before each line. The file is opened for every line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, text: str) -> int:
        if text.strip():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")
        return len(text)

    def flush(self) -> None:
        """Does nothing: every line is on disk already."""


def _ending(state: State, error: BaseException | None) -> str:
    at = f"after step {state.step} of {state.total_steps}"
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted {at}; steps since the last checkpoint are lost"
    if error is not None:
        return f"ended by an error {at}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"finished {at}" if state.step >= state.total_steps else f"stopped {at}, with a checkpoint"


def read_state(folder: Path) -> State | None:
    """Returns the state of a run; None for a run of an earlier version. A run whose process has vanished from this
    machine has ended. Raises UserError if the file is broken; keys of a later version are left out."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = read_bytes(path, LONGEST_LINE)
        state = TypeAdapter(State).validate_json(content)
    except ValidationError as error:
        what = "; ".join(": ".join([*map(str, one["loc"]), one["msg"]]) for one in error.errors())
        raise UserError(f"{path}: not the state of a run ({what}). Move the file away and try again.") from error
    if not is_intact(content):
        raise UserError(f"{path}: damaged (wrong SHA-256). Move the file away and try again.")
    if state.ended is None and state.host == socket.gethostname() and not psutil.pid_exists(state.pid):
        return replace(state, ended=f"killed in the phase {state.phase!r}: its process {state.pid} has vanished")
    return state


def seconds_left(rows: Sequence[Row], total_steps: int, now: float) -> float | None:
    """Estimates the seconds to the last step from the last steps that a run has logged."""
    done = [(row["step"], row["time"]) for row in rows if isinstance(row.get("time"), int | float)][-RECENT_STEPS:]
    if len(done) < 2 or done[-1][0] == done[0][0]:
        return None
    (first, start), (last, end) = done[0], done[-1]
    return max(0.0, (end - start) / (last - first) * (total_steps - last) - (now - end))


def progress(folder: Path, now: float) -> list[tuple[str, str]]:
    """Returns name and value of what a user wants to know of a run: step, reward, time left, phase, or how it ended."""
    state, rows = read_state(folder), read_metrics(folder)
    step = max((row["step"] for row in rows), default=0)
    facts = [("step", f"{step} of {state.total_steps}" if state else str(step))]
    if rewards := series(rows, "reward/mean")[1]:
        recent = rewards[-10:]
        facts.append(("reward", f"{number(sum(recent) / len(recent))} (mean of the last {len(recent)} steps)"))
    if state and state.ended:
        facts.append(("state", f"{state.ended}, {duration(now - state.since)} ago"))
    elif state:
        facts.append(
            ("phase", f"{state.phase}, for {duration(now - state.since)} (process {state.pid} on {state.host})")
        )
        facts.append(("left", duration(seconds_left(rows, state.total_steps, now))))
    return facts
