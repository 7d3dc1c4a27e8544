"""A run is killed with SIGKILL during a background save: what is left is never taken for a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_rl.checkpoint import save
from megatron_rl.checkpoint.manifest import PARTIAL, checkpoints, read_checkpoint
from tests import ranks
from tests.unit.checkpoint.conftest import FILES, FakeRanks, Saving, state

MOMENTS = ("within a file", "before the manifest", "before the rename")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, ranks: FakeRanks) -> None:
    """Make this process kill itself in the middle of the next save."""
    if moment == "within a file":

        def half(folder: Path) -> list[object]:
            name, data = next(iter(FILES.items()))
            with (folder / name).open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                die()
            return []

        ranks.write_held = half  # type: ignore[method-assign, assignment]
    elif moment == "before the manifest":
        save.write_manifest = lambda folder, manifest: die()
    else:
        save._sync = lambda path: die()


@pytest.mark.parametrize("moment", MOMENTS)
def test_remains_of_a_killed_save_are_not_a_checkpoint(saving: Saving, moment: str) -> None:
    killed = ranks.context().Process(target=save_and_die, args=(saving.folder, moment))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    (left,) = saving.folder.glob(f"*{PARTIAL}")
    assert any(left.iterdir())
    assert [path.name for path in checkpoints(saving.folder)] == ["step_000001"]
    assert read_checkpoint(saving.folder / "step_000001").state == state(1)

    saving.save(2)  # the resumed run
    assert not left.exists()
    assert read_checkpoint(saving.folder / "step_000002").state == state(2)


def save_and_die(folder: Path, moment: str) -> None:
    doomed = Saving(folder)
    doomed.save(1)
    die_at(moment, doomed.ranks)
    with doomed.saver() as saver:
        saver.save(state(2), {}, background=True)
        time.sleep(60)
