"""Writing of the complete Countdown task to a folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.data.countdown.model import CALCULATOR, VOCABULARY, write_model
from megatron_rl.data.countdown.problems import RL_MIN_SHARE, Numbers, Problem, Splits, label, prompt, split_problems
from megatron_rl.data.countdown.traces import MIX_A, MIX_B, MIX_CALCULATOR, traces
from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import read_json_object

VERSION = 2
"""Version of the content. It must be raised whenever the same arguments would write different files."""
WARM_START_TRACES = (900 * 128, 260 * 128)
CALCULATOR_TRACES = 400 * 128
MANIFEST = "manifest.json"


def write_task(folder: Path, *, seed: int = 0, warm_start_traces: tuple[int, int] = WARM_START_TRACES) -> None:
    """Writes the Countdown task unless `folder` already holds it.

    `train.jsonl`, `held_out.jsonl`, `fresh.jsonl`  rows of prompt and label; problems with solution share >= 0.12
    `warm_start_a.parquet`, `warm_start_b.parquet`  columns prompt and response; training problems of all shares
    `model/`                                        untrained weights, configuration and tokenizer
    `manifest.json`                                 the arguments, and the SHA-256 of every file

    The folder is created atomically: either complete or not at all. Raises UserError if the folder holds anything else,
    another version of the task or changed files, or if it cannot be written.
    """
    settings = {"task": "countdown", "version": VERSION, "seed": seed, "warm_start_traces": list(warm_start_traces)}
    _write(folder, settings, lambda draft: _write_files(draft, seed, warm_start_traces))


def write_calculator_task(folder: Path, *, seed: int = 0, warm_start_traces: int = CALCULATOR_TRACES) -> None:
    """Writes the Countdown task with the word `calc`, which asks a calculator for a result, as `write_task` does. There
    is one file of traces, `warm_start.parquet`, in which a tenth of the attempts has calls."""
    settings = {"task": "countdown_calculator", "version": 1, "seed": seed, "warm_start_traces": warm_start_traces}

    def write_files(draft: Path) -> None:
        splits = _write_problems(draft, seed)
        columns = traces(splits.train, warm_start_traces, MIX_CALCULATOR, seed=seed)
        pq.write_table(pa.table(columns), draft / "warm_start.parquet")
        write_model(draft / "model", seed, (*VOCABULARY, CALCULATOR))

    _write(folder, settings, write_files)


def _write(folder: Path, settings: dict[str, Any], write_files: Callable[[Path], None]) -> None:
    if _is_written(folder, settings):
        return
    # A sibling folder, so that the rename stays within one file system.
    draft = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    try:
        draft.mkdir(parents=True)
        write_files(draft)
        manifest = settings | {"files": {name: _sha256(draft / name) for name in _file_names(draft)}}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        draft.rename(folder)
    except OSError as error:
        # Another process may have written the same task in the meantime.
        if not _is_written(folder, settings):
            raise UserError(f"cannot write the Countdown task to {folder}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_problems(folder: Path, seed: int) -> Splits:
    splits = split_problems(seed)
    rng = random.Random(seed)
    train = (
        (order, problem) for problem in _for_rl(splits.train) for order in sorted(set(permutations(problem.numbers)))
    )
    _write_rows(folder / "train.jsonl", train)
    for name, problems in (("held_out", splits.held_out), ("fresh", splits.fresh)):
        one_order = ((tuple(rng.sample(problem.numbers, 3)), problem) for problem in _for_rl(problems))
        _write_rows(folder / f"{name}.jsonl", one_order)
    return splits


def _write_files(folder: Path, seed: int, warm_start_traces: tuple[int, int]) -> None:
    splits = _write_problems(folder, seed)
    # Each phase has a seed of its own, so that the phases do not repeat each other's draws.
    for phase, (name, mix) in enumerate((("warm_start_a", MIX_A), ("warm_start_b", MIX_B))):
        columns = traces(splits.train, warm_start_traces[phase], mix, seed=2 * seed + phase)
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    write_model(folder / "model", seed)


def _for_rl(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.share >= RL_MIN_SHARE]


def _write_rows(path: Path, rows: Iterable[tuple[Numbers, Problem]]) -> None:
    lines = (
        json.dumps({"prompt": prompt(order, problem.target), "label": label(order, problem.target)})
        for order, problem in rows
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def _is_written(folder: Path, settings: dict[str, Any]) -> bool:
    """Returns whether the folder holds exactly this task; False for a missing or empty folder.

    Raises UserError for any other content.
    """
    remedy = "Delete the folder or choose another."
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder for the Countdown task. Choose another path.")
    try:
        manifest = read_json_object(folder / MANIFEST)
        files = manifest.pop("files")
    except (UserError, KeyError) as error:
        raise UserError(f"{folder} holds something else than the Countdown task. {remedy}") from error
    if manifest != settings:
        raise UserError(f"{folder} holds another Countdown task: {manifest} instead of {settings}. {remedy}")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(f"{path} is missing or was changed since the Countdown task was written. {remedy}")
    return True


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
