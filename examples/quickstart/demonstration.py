"""GRPO and Lp-Reg side by side: two runs at the same time, one core each, that differ in the method only.

    python examples/quickstart/demonstration.py [key=value ...]

Both runs start from the same warm start, draw the same prompts in the same order, and have the same settings
(demonstration.yaml). One view shows both. The end is one report of both runs and a conclusion that is written from the
numbers. Overrides hold for both runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.quickstart.comparison import METHODS, conclusion, last_problems, outcomes, table
from examples.quickstart.progress import Progress, Watched
from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.observability.report import write_report

CONFIG = Path(__file__).with_name("demonstration.yaml")
LINES_OF_FAILURE = 15


def main(overrides: Sequence[str]) -> int:
    """Returns the exit status: 0, 1 if a run failed, 2 for wrong overrides, 130 if interrupted."""
    console = Console()
    folder = Path("runs") / f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if chosen := [text for text in overrides if text.split("=")[0] in ("algorithm.name", "run.name", "run.folder")]:
            raise UserError(
                f"{chosen[0]}: the demonstration sets this itself. To train one method: megatron-rl train "
                f"{CONFIG.with_name('countdown.yaml')} {' '.join(overrides)}"
            )
        config = load_config(CONFIG, list(overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"GRPO and Lp-Reg, {config.train.steps} steps each, one core each; logs and results in {folder}")
    runs = watched(folder, config.train.steps)
    status = train(runs, overrides, Progress(list(runs.values()), console))
    if status == 0:
        conclude(folder, runs, console)
    return status


def watched(folder: Path, steps: int) -> dict[str, Watched]:
    """Returns the run of each method in the folder of a demonstration, which need not exist."""
    return {
        method: Watched(label, folder / method, folder / f"{method}.log", steps) for method, label in METHODS.items()
    }


def train(runs: dict[str, Watched], overrides: Sequence[str], progress: Progress) -> int:
    """Runs all trainings to their end. If one fails, the others are stopped and its last lines are shown."""
    processes = {method: start(method, run, overrides) for method, run in runs.items()}
    try:
        with progress:
            while any(process.poll() is None for process in processes.values()):
                if any(process.returncode for process in processes.values()):
                    stop(processes.values())
                    break
                progress.update()
                time.sleep(1)
    except KeyboardInterrupt:  # the runs have received it too: each ends its step and writes a checkpoint
        print("stopping both runs after their current step; a second Ctrl-C stops them at once", flush=True)
        with suppress(KeyboardInterrupt):
            for process in processes.values():
                process.wait()
        stop(processes.values())
        return 130
    failed = [method for method, process in processes.items() if process.returncode not in (0, -signal.SIGTERM)]
    for method in failed:
        lines = runs[method].output.read_text(errors="replace").splitlines()[-LINES_OF_FAILURE:]
        print("\n".join([f"{runs[method].label} failed:", *lines]), file=sys.stderr)
    return 1 if failed or any(run.step < run.steps for run in runs.values()) else 0


def start(method: str, run: Watched, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts one training, with its output in a file."""
    own = [f"algorithm.name={method}", f"run.name={run.label}", f"run.folder={run.folder}"]
    command = [sys.executable, "-m", "megatron_rl.cli", "train", str(CONFIG), *overrides, *own]
    run.output.parent.mkdir(parents=True, exist_ok=True)
    with run.output.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Asks every process that still runs to stop, as `kill` does, and waits for its end."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.send_signal(signal.SIGTERM)
    for process in left:
        process.wait()


def conclude(folder: Path, runs: dict[str, Watched], console: Console) -> None:
    """Writes the common report, and prints and keeps the conclusion."""
    folders = {method: run.folder for method, run in runs.items()}
    report = write_report(list(folders.values()), folder / "report.html")
    found = outcomes(folders)
    words = conclusion(found, len(last_problems(folders["grpo"])))
    (folder / "conclusion.txt").write_text(words + "\n")
    console.print(table(found))
    console.print(f"\n{words}\n", highlight=False)
    for label, path in (("report of both runs", report), *((run.label, run.folder) for run in runs.values())):
        console.print(f"  {label:<22}{path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
