from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.checkpoint.save import (
    MANIFEST,
    DriverState,
    checkpoints,
    keep_last,
    read_checkpoint,
    save_checkpoint,
)
from megatron_rl.errors import UserError

FILES = {"weights-stage-0.safetensors": b"weights", "exp_avg-stage-0.safetensors": b"moments"}


def write_ranks(folder: Path) -> dict[str, str]:
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


def state(step: int) -> DriverState:
    return DriverState(step=step, weight_version=step + 1, cursor={"epoch": 1, "position": step})


def save(folder: Path, step: int, ranks: Callable[[Path], dict[str, str]] = write_ranks) -> Path:
    return save_checkpoint(folder, state(step), ranks, bytes_needed=100)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path / "made" / "here", 50)
    assert path == tmp_path / "made" / "here" / "step_000050"
    assert {file.name for file in path.iterdir()} == {*FILES, MANIFEST}
    assert read_checkpoint(path) == state(50)


@pytest.mark.parametrize("error", [RuntimeError("a rank died"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_and_keeps_what_is_there(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)

    def fail(folder: Path) -> dict[str, str]:
        write_ranks(folder)
        raise error

    for step in (1, 2):  # over an existing one too
        with pytest.raises(type(error)):
            save(tmp_path, step, fail)
        assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
        assert contents(tmp_path) == before


def test_a_failure_at_the_very_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("pulled the plug")

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RuntimeError, match="pulled"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_folder_not_yet_renamed_is_no_checkpoint(tmp_path: Path) -> None:
    """What a killed process leaves: the manifest may be half-written."""
    done = save(tmp_path, 1)
    left = tmp_path / "step_000002.partial"
    left.mkdir()
    (left / MANIFEST).write_text('{"format": 1, "sta')
    (tmp_path / "step_000003").mkdir()  # without a manifest
    assert checkpoints(tmp_path) == [done]
    assert read_checkpoint(save(tmp_path, 2)) == state(2)
    assert not left.exists()


def test_the_same_step_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, lambda folder: {})
    assert read_checkpoint(save(tmp_path, 5)) == state(5)
    assert {file.name for file in (tmp_path / "step_000005").iterdir()} == {*FILES, MANIFEST}


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (2, 10, 999_999, 1_000_000):
        save(tmp_path, step)
    assert [read_checkpoint(path).step for path in checkpoints(tmp_path)] == [2, 10, 999_999, 1_000_000]
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("count", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path: Path, count: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    keep_last(tmp_path, count)
    assert [read_checkpoint(path).step for path in checkpoints(tmp_path)] == left


def test_after_a_resume_from_an_older_one_the_later_ones_go(tmp_path: Path) -> None:
    """They would be taken for newer than what follows: `keep_last` would remove that, `resume=auto` pass over it."""
    for step in (50, 100, 150):
        save(tmp_path, step)
    save(tmp_path, 60)
    keep_last(tmp_path, 2)
    assert [read_checkpoint(path).step for path in checkpoints(tmp_path)] == [50, 60]


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path} is not a checkpoint: it has no {MANIFEST}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(UserError, match=rf"{path / name} is missing: .*resume=PATH"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"weightt"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = save(tmp_path, 1)
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{path / name} is damaged .*SHA-256.*resume=PATH"):
        read_checkpoint(path)


def damages() -> dict[str, bytes]:
    whole = {"format": 1, "state": {"step": 1, "weight_version": 2, "cursor": {}}, "sha256": {}}
    return {
        "empty": b"",
        "cut short": json.dumps(whole).encode()[:-20],
        "no text": b"\xff\xfe\x00",
        "no object": b"[]",
        "no state": json.dumps({"sha256": {}}).encode(),
        "no hashes": json.dumps({"state": whole["state"]}).encode(),
        "another state": json.dumps(whole | {"state": {"step": 1}}).encode(),
        "another list of hashes": json.dumps(whole | {"sha256": ["weights"]}).encode(),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 1)
    (path / MANIFEST).write_bytes(damages()[damage])
    with pytest.raises(UserError, match=rf"{path / MANIFEST} is damaged .*resume=PATH"):
        read_checkpoint(path)


def test_a_copied_checkpoint_is_as_good(tmp_path: Path) -> None:
    copy = shutil.copytree(save(tmp_path, 7), tmp_path / "elsewhere")
    assert read_checkpoint(copy) == state(7)
