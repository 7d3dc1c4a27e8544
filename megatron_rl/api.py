"""Training from Python: the same run as `megatron-rl train`, with its result as an object."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rl.config import Config, load_config
from megatron_rl.config.remarks import warn
from megatron_rl.data.hub import with_local_copies


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    """The run's folder, with its checkpoints, rollouts and report."""
    steps: int
    """The last step of the run; fewer than `train.steps` if the run was interrupted."""
    metrics: list[dict[str, Any]] = field(repr=False)
    """The lines of metrics.jsonl: `step`, `time`, and every metric as a number or None."""
    export: Path | None
    """The trained model, a Hugging Face folder; None if the run exported none, for example because it was
    interrupted."""
    report: Path | None
    """The report, an HTML file."""


def train(config: Config | Path | str, overrides: Sequence[str] = ()) -> RunResult:
    """Trains to the last step, or to a clean stop with a checkpoint after Ctrl-C.

    config: what `load_config` returned, or the path of a YAML file, on which `overrides` (`key.path=value`) then apply.
    No `if __name__ == "__main__":` is needed around the call. Raises UserError for anything that the user can fix.
    """
    if isinstance(config, Config):
        if overrides:
            raise ValueError("overrides apply to a YAML file; give those of a Config to load_config")
    else:
        config = load_config(config, overrides)
    warn(config)
    config = with_local_copies(config)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the processes of a run share the machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # after the downloads
    # The first line comes before torch is imported, which takes seconds.
    print(f"{config.run.name}: {config.algorithm.name}, {config.train.steps} steps, starting", flush=True)
    from megatron_rl.loop import train as train_to_the_end

    with _main_module_hidden():
        train_to_the_end(config)
    return result_of(config.run.folder)


def result_of(folder: Path) -> RunResult:
    """Returns the result that a run's folder holds. Raises UserError for a damaged metrics.jsonl."""
    from megatron_rl.observability.metrics import read_metrics

    metrics = read_metrics(folder)
    export, report = folder / "hf", folder / "report.html"
    return RunResult(
        folder=folder,
        steps=max((row["step"] for row in metrics), default=0),
        metrics=metrics,
        export=export if export.is_dir() else None,
        report=report if report.is_file() else None,
    )


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Hides the caller's script from multiprocessing, whose new processes would import it and so start the run again.

    Processes of a run need nothing of the script: functions of a user are named by their import path.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
