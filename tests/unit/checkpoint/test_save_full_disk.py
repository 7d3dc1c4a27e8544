"""A disk without room: a UserError that names the folder, nothing half-written, earlier checkpoints as they were."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rl.checkpoint.save import DriverState, read_checkpoint, save_checkpoint
from megatron_rl.checkpoint.state import write_tensors
from megatron_rl.errors import UserError

Usage = namedtuple("Usage", "total used free")
MIB = 2**20


def state(step: int) -> DriverState:
    return DriverState(step, step, {})


def write_small(folder: Path) -> dict[str, str]:
    (folder / "small").write_bytes(b"small")
    return {"small": hashlib.sha256(b"small").hexdigest()}


def assert_only_the_first_is_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["step_000001"]
    assert read_checkpoint(folder / "step_000001") == state(1)


def test_too_little_room_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(1), write_small, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * MIB, 9 * MIB, MIB))

    def not_called(_: Path) -> dict[str, str]:
        raise AssertionError("the ranks were asked to save")

    with pytest.raises(UserError, match=rf"{tmp_path}/step_000002 \(1\.5 MiB needed, 1\.0 MiB free\).*resume=auto"):
        save_checkpoint(tmp_path, state(2), not_called, MIB * 3 // 2)
    assert_only_the_first_is_left(tmp_path)
    save_checkpoint(tmp_path, state(2), write_small, MIB)  # just enough


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_while_a_rank_writes(tmp_path: Path, number: int) -> None:
    save_checkpoint(tmp_path, state(1), write_small, 100)

    def fill(folder: Path) -> dict[str, str]:
        write_small(folder)
        raise OSError(number, os.strerror(number), str(folder / "large"))

    for step in (1, 2):
        with pytest.raises(UserError, match=rf"{tmp_path}/step_00000{step} \({os.strerror(number)}\)"):
            save_checkpoint(tmp_path, state(step), fill, 100)
        assert_only_the_first_is_left(tmp_path)


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail(_: Path) -> dict[str, str]:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: Input/output error"):
        save_checkpoint(tmp_path, state(1), fail, 100)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_remote_rank_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a copy of a rank's error that is an OSError without errno."""
    import ray

    from megatron_rl.cluster.runtime import results

    full = OSError(errno.ENOSPC, "No space left on device")

    def raise_remote(_: object) -> None:
        raise ray.exceptions.RayTaskError("save", "traceback", full).as_instanceof_cause()

    monkeypatch.setattr(ray, "get", raise_remote)
    with pytest.raises(OSError, match="No space") as caught:
        results([])
    assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    save_checkpoint(tiny_disk, state(1), write_small, 100)
    tensors = {"w": torch.zeros(MIB // 2)}

    def write_too_much(folder: Path) -> dict[str, str]:
        return {"w.safetensors": write_tensors(folder / "w.safetensors", tensors)}

    with pytest.raises(UserError, match=rf"{tiny_disk}/step_000002 \(2\.0 MiB needed, 1\.0 MiB free\)"):
        save_checkpoint(tiny_disk, state(2), write_too_much, 2 * MIB)
    with pytest.raises(UserError, match=rf"{tiny_disk}/step_000002 \(No space left on device\)"):
        save_checkpoint(tiny_disk, state(2), write_too_much, 100)
    assert_only_the_first_is_left(tiny_disk)
    save_checkpoint(tiny_disk, state(2), write_small, 100)
