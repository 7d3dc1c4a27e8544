"""Trains what docs/evidence.md reports, and keeps the results.

    python -m benchmarks.evidence [--plan quick] [--at-once 2] [--minutes 180] [--out FILE]

A run whose result is kept is not repeated, and an interrupted one continues, so the command can be stopped (Ctrl-C) and
started again at any time. `--minutes` starts no further run after that time. Results are written after every run.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import PLANS, Run
from benchmarks.evidence.runs import FOLDER, NOT_KEPT, outcome, start
from benchmarks.machine import arguments, keep

LINES_OF_FAILURE = 15


class Results:
    """The kept results of a plan, in a file that is complete after every run."""

    def __init__(self, file: Path, plan: str) -> None:
        self._file, self._plan = file, plan
        self.runs: dict[str, dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else {}

    def add(self, run: Run) -> None:
        """Keeps the outcome of a finished run, and deletes the large files of its folder."""
        self.runs[run.name] = outcome(run)
        draft = self._file.with_suffix(".writing")
        keep(draft, f"evidence, {self._plan}", plan=self._plan, runs=self.runs)
        draft.replace(self._file)
        for name in NOT_KEPT:
            shutil.rmtree(FOLDER / run.name / name, ignore_errors=True)


def train(runs: Iterable[Run], results: Results, at_once: int, in_time: Callable[[], bool]) -> bool:
    """Trains the runs that have no result, some at a time. Returns whether all have one now.

    Raises SystemExit with the last lines of a run that failed. The others are stopped, as after Ctrl-C.
    """
    waiting = [run for run in runs if run.name not in results.runs]
    running: dict[Run, Any] = {}
    try:
        while running or (waiting and in_time()):
            while waiting and len(running) < at_once and in_time():
                run = waiting.pop(0)
                print(f"{time.strftime('%H:%M:%S')} {run.name}: starts, {len(waiting)} wait", flush=True)
                running[run] = start(run)
            time.sleep(0.5)
            for run, process in [(run, process) for run, process in running.items() if process.poll() is not None]:
                del running[run]
                if process.returncode:
                    lines = (FOLDER / f"{run.name}.log").read_text(errors="replace").splitlines()
                    raise SystemExit("\n".join([f"{run.name} failed:", *lines[-LINES_OF_FAILURE:]]))
                results.add(run)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return not waiting


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--at-once", type=int, default=2, help="trainings side by side, one core each (default: 2)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    options = parser.parse_args()
    plan, begun = PLANS[options.plan], time.monotonic()
    name = {"quick": "evidence_quick", "full": "evidence"}[options.plan]
    results = Results(options.out or Path(f"runs/benchmarks/{name}.json"), options.plan)
    results_folder = options.out.parent if options.out else Path("runs/benchmarks")
    results_folder.mkdir(parents=True, exist_ok=True)

    def in_time() -> bool:
        return time.monotonic() - begun < options.minutes * 60

    train((run for _, _, run in plan.tuning()), results, options.at_once, in_time)
    chosen = plan.chosen(results.runs)
    if chosen is None or not train([*plan.compared(chosen), *plan.long(chosen)], results, options.at_once, in_time):
        print("the time is over; the same command continues", file=sys.stderr)


if __name__ == "__main__":
    main()
