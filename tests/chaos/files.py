"""Damage to the files of a finished run, shown to the code that reads them, without a run: thousands cost a minute."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.manifest import checkpoints, read_manifest, verify
from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.observability.metrics import Row, read_metrics
from megatron_rl.observability.state import read_state
from megatron_rl.run import folder as run_folder
from megatron_rl.run.resume import changed_metrics
from megatron_rl.utils.bounded import read_parquet
from tests.chaos import damage
from tests.chaos.episode import Met
from tests.chaos.world import QUICKSTART, RUN, SMALL, World

WHOLE = (damage.remove, damage.swap)
"""Damage that only the hash of the file reveals, kept elsewhere."""
WHOLE_KNOWN = ("checkpoint", "metrics.jsonl")
Reader = Callable[[Path, Path], Any]
"""Reads a file of a run's folder as the product does."""


def _resumed(folder: Path, path: Path) -> str:
    """Returns the checkpoint that a run resumes from. Raises AssertionError if that is the damaged one."""
    config = load_config(QUICKSTART, [*SMALL, *RUN, f"run.folder={folder}", "resume=auto"])
    found = run_folder.checkpoint_to_resume(config)
    assert found is not None, "no checkpoint is found"
    verify(found.checkpoint, found.manifest)
    newest = checkpoints(folder / "checkpoints")[-1]
    intact = path.parent != found.checkpoint and (path.parent != newest or found.damaged)
    assert intact, f"the damaged {path} is used"
    return "passed over"


def _created(folder: Path, path: Path) -> list[str]:
    """Writes the configuration anew, as a resumed run does."""
    config = load_config(QUICKSTART, [*SMALL, *RUN, f"run.folder={folder}", "resume=auto"])
    changes = run_folder.create(config)
    assert load_config(path, []) == config
    return changes


def _metrics(folder: Path, path: Path) -> list[Row]:
    """Reads the metrics as a run does that is resumed from its newest checkpoint."""
    rows = read_metrics(folder)
    newest = checkpoints(folder / "checkpoints")[-1]
    if found := changed_metrics(folder, run_folder.Resumption(newest, read_manifest(newest))):
        raise UserError(found[0])
    return rows


KINDS: tuple[tuple[str, str, Reader], ...] = (
    ("checkpoint", "checkpoints/step_000060/*", _resumed),
    ("metrics.jsonl", "metrics.jsonl", _metrics),
    ("config.yaml", "config.yaml", _created),
    ("state.json", "state.json", lambda folder, path: read_state(folder)),
    ("rollouts", "rollouts/*.parquet", lambda folder, path: read_parquet(path).to_pylist()),
)


def play(world: World, seed: int, number: int, most: int) -> list[Met]:
    """Damages one file at a time, `most` times, and returns what its reader did."""
    rng = random.Random(f"files-{seed}-{number}")
    folder = world.folder / f"runs/files-{os.getpid()}"
    shutil.copytree(world.folder / "runs/undisturbed", folder, symlinks=True)
    try:
        with chdir(world.folder):
            return [met for _ in range(most) if (met := _one(folder, number, rng))]
    finally:
        shutil.rmtree(folder)


def _one(folder: Path, number: int, rng: random.Random) -> Met | None:
    """Returns nothing if chance has left the file as it was."""
    name, pattern, read = rng.choices(KINDS, (8, 2, 1, 1, 2))[0]
    path = rng.choice(sorted(path for path in folder.glob(pattern) if path.stat().st_size))
    content = path.read_bytes()
    intact = None if name in ("checkpoint", "config.yaml") else read(folder, path)
    how = rng.choice([how for how in damage.ANY if how not in WHOLE or name in WHOLE_KNOWN])
    how(path, rng)
    if path.exists() and path.read_bytes() == content:
        return None
    met = Met(number, f"file: {how.__name__}", name, "reading", 0, verdict="equal")
    try:
        found = read(folder, path)
        met.effect = "passed over" if name in ("checkpoint", "config.yaml") else _compared(found, intact)
        if met.effect == "read as something else":
            met.verdict = "silent"
    except UserError as error:
        met.effect, met.detail = "refused with a reason", str(error)[:300]
    except Exception as error:
        met.effect, met.verdict, met.detail = "traceback", "traceback", repr(error)[:300]
    path.write_bytes(content)
    return met


def _compared(found: Any, intact: Any) -> str:
    if found == intact:
        return "harmless"
    if isinstance(found, list) and found == intact[: len(found)]:
        return "the end is left out"
    return "read as something else"
