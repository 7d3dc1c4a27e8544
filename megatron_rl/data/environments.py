"""Tasks of environments of other libraries, as data files: `reasoning-gym:TASK`, `verifiers:ENVIRONMENT`,
`harbor:FOLDER`.

The adapters in `megatron_rl/environments/` make the rows. This file keeps them below the cache of the Hub, so that a
run reads, counts and records them like any other data.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.errors import UserError
from megatron_rl.utils.files import atomically
from megatron_rl.utils.import_path import import_callable

from .rows import read_rows

SOURCES = {
    "reasoning-gym": "megatron_rl.environments.reasoning_gym:tasks",
    "verifiers": "megatron_rl.environments.verifiers:tasks",
    "harbor": "megatron_rl.environments.harbor:tasks",
}
"""Name of a library -> import path of the function that makes rows: of the name after the colon, the settings, and
whether the rows are held out for evaluation. The function raises UserError without the key."""
SUITE_SIZE = 100
"""Problems of a suite that does not say how many."""


def is_environment(path: Path) -> bool:
    """Whether a path is no path, but names the tasks of an environment."""
    return str(path).partition(":")[0] in SOURCES and ":" in str(path)


def write_tasks(path: Path, key: str, split: str, settings: TaskSettings | None) -> Path:
    """Writes the tasks of an environment and returns the file, whose name depends on everything that chose them.

    split: "train", or "test" for tasks that no training has. Raises UserError, with the key, for an environment that is
    not to be had.
    """
    from huggingface_hub import cached_assets_path

    library, _, name = str(path).partition(":")
    settings = settings or TaskSettings()
    if split != "train" and "size" not in settings.model_fields_set:
        settings = settings.model_copy(update={"size": SUITE_SIZE})
    try:
        rows = list(import_callable(SOURCES[library], key)(name, settings, split != "train"))
    except UserError as error:
        raise UserError(f"{key}: {path}: {error}") from error
    if not rows:
        raise UserError(f"{key}: {path} has no tasks")
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {path}: a task cannot be written as JSON: {error}") from error
    chosen = hashlib.sha256(json.dumps([str(path), split, settings.model_dump(mode="json")]).encode()).hexdigest()
    folder = cached_assets_path("megatron-rl", namespace="environments", subfolder=library)
    file = folder / f"{library}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-')[-60:]}-{split}-{chosen[:12]}.jsonl"
    with atomically(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file


def check_held_out(train: Path, suites: Mapping[str, Path]) -> None:
    """Raises UserError if a suite has a problem that the training file, made by an environment, has too.

    A problem is its column `problem` or, without one, its prompt.
    """
    known = set(_problems(train))
    for name, path in suites.items():
        if not path.is_file():
            continue
        problems = _problems(path)
        if shared := sum(problem in known for problem in problems):
            raise UserError(
                f"evaluation.suites.{name}: {shared} of its {len(problems)} problems are also in data.train. Choose "
                "other problems by the settings of the environment (tasks.settings), or fewer of them for training"
            )


def _problems(path: Path) -> list[str]:
    return [json.dumps(row.get("problem", row.get("prompt"))) for _, row in read_rows(path)]
