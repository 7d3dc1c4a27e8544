from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.checkpoint import rng
from megatron_rl.checkpoint.manifest import MANIFEST, RNG, checkpoints, read_checkpoint, read_rng
from megatron_rl.errors import UserError
from tests.unit.checkpoint.conftest import FILES, Saving, state


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("background", [False, True])
def test_a_saved_checkpoint_is_read_back(saving: Saving, background: bool) -> None:
    saving.folder /= "made/here"
    with saving.saver() as saver:
        saver.save(state(50), {"reward/mean": 0.5, "train/loss": float("nan")}, background=background)
    path = saving.folder / "step_000050"
    assert {file.name for file in path.iterdir()} == {*FILES, MANIFEST, RNG}
    manifest = read_checkpoint(path)
    assert (manifest.state, manifest.origin, manifest.optimizer_steps) == (state(50), saving.origin, 7)
    assert manifest.metrics == {"reward/mean": 0.5, "train/loss": None}
    assert len(read_rng(path).ranks) == 1
    assert saving.messages == [f"checkpoint: {path}"]


def test_the_drivers_random_state_is_that_at_the_call_of_save(saving: Saving) -> None:
    with saving.saver() as saver:
        saver.save(state(1), {}, background=True)
        expected = random.random()
    random.random()
    rng.restore(read_rng(saving.folder / "step_000001").driver)
    assert random.random() == expected


class Gate:
    """Blocks the ranks' background writing until it is opened."""

    def __init__(self, saving: Saving) -> None:
        self.opened = threading.Event()
        write = saving.ranks.write_held

        def wait_and_write(folder: Path) -> Any:
            assert self.opened.wait(600)
            return write(folder)

        saving.ranks.write_held = wait_and_write  # type: ignore[method-assign]


def test_training_continues_during_a_background_save(saving: Saving) -> None:
    gate = Gate(saving)
    with saving.saver() as saver:
        saver.save(state(1), {}, background=True)
        saving.ranks.contents = dict.fromkeys(FILES, b"trained on")
        assert saver.poll() == {}
        assert checkpoints(saving.folder) == []
        gate.opened.set()
        saver.wait()
        (seconds,) = saver.poll().items()
        assert seconds[0] == "perf/checkpoint_background_seconds" and seconds[1] > 0
        assert saver.poll() == {}
    read_checkpoint(saving.folder / "step_000001")
    assert {name: (saving.folder / "step_000001" / name).read_bytes() for name in FILES} == FILES


def test_a_save_waits_for_the_previous_one(saving: Saving) -> None:
    gate, order = Gate(saving), []
    hold = saving.ranks.hold_state

    def record_and_hold() -> None:
        order.append([path.name for path in checkpoints(saving.folder)])
        hold()

    saving.ranks.hold_state = record_and_hold  # type: ignore[method-assign]
    with saving.saver() as saver:
        saver.save(state(1), {}, background=True)
        threading.Timer(0.2, gate.opened.set).start()
        saver.save(state(2), {}, background=True)
        assert saver.poll() != {}  # the seconds of the first save are not lost
    assert order == [[], ["step_000001"]]
    assert [path.name for path in checkpoints(saving.folder)] == ["step_000001", "step_000002"]


def test_a_background_failure_is_raised_at_the_next_step(saving: Saving) -> None:
    saving.save(1)
    saving.ranks.fail = OSError(5, "Input/output error")
    saver = saving.saver()
    saver.save(state(2), {}, background=True)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*step_000002: Input/output error"):
        while True:
            saver.poll()
    assert steps(saving.folder) == ["step_000001"]


def test_a_background_failure_is_raised_at_the_end(saving: Saving) -> None:
    saving.ranks.fail = OSError(5, "Input/output error")
    with pytest.raises(UserError, match="Input/output error"), saving.saver() as saver:
        saver.save(state(2), {}, background=True)
    assert steps(saving.folder) == []


def test_a_run_that_ends_with_an_error_still_completes_its_checkpoint(saving: Saving) -> None:
    with pytest.raises(RuntimeError, match="the run failed"), saving.saver() as saver:
        saver.save(state(2), {}, background=True)
        raise RuntimeError("the run failed")
    read_checkpoint(saving.folder / "step_000002")


def test_an_interrupt_does_not_wait_for_the_save(saving: Saving) -> None:
    gate = Gate(saving)
    with pytest.raises(KeyboardInterrupt), saving.saver() as saver:
        saver.save(state(2), {}, background=True)
        raise KeyboardInterrupt
    assert checkpoints(saving.folder) == []
    gate.opened.set()


@pytest.mark.parametrize("error", [RuntimeError("a rank died"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_new_and_keeps_older_checkpoints(saving: Saving, error: BaseException) -> None:
    saving.save(1)
    before = contents(saving.folder)
    saving.ranks.fail = error
    for step in (1, 2):  # also over an existing checkpoint
        with pytest.raises(type(error)):
            saving.save(step)
        assert contents(saving.folder) == before


def test_a_failure_of_the_rename_leaves_nothing(saving: Saving, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("power failed")

    saving.save(1)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RuntimeError, match="power failed"):
        saving.save(2)
    assert steps(saving.folder) == ["step_000001"]


def test_remains_of_a_killed_run_are_not_checkpoints_and_are_removed(saving: Saving) -> None:
    done = saving.save(1)
    left = saving.folder / "step_000002.0a1b2c3d.partial"
    left.mkdir()
    (left / MANIFEST).write_text('{"format": 2, "sta')
    (saving.folder / "step_000003").mkdir()  # a folder without a manifest
    assert checkpoints(saving.folder) == [done]
    saving.saver()
    assert not left.exists()


def test_saving_the_same_step_again_replaces_the_checkpoint(saving: Saving) -> None:
    saving.ranks.contents = {"old-rank-0-part-0.safetensors": b"old"}
    saving.save(5)
    saving.ranks.contents = dict(FILES)
    path = saving.save(5)
    read_checkpoint(path)
    assert {file.name for file in path.iterdir()} == {*FILES, MANIFEST, RNG}
    assert steps(saving.folder) == ["step_000005"]


def test_after_a_resume_from_an_older_checkpoint_later_ones_are_removed(saving: Saving) -> None:
    """Otherwise they would count as newer: retention would remove the following ones, and `resume=auto` skip them."""
    for step in (50, 100, 150, 60):
        saving.save(step)
    assert steps(saving.folder) == ["step_000050", "step_000060"]
