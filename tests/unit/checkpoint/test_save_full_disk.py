"""A full disk: a UserError names the folder, nothing half-written is left, and earlier checkpoints are unchanged."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rl.checkpoint import rng
from megatron_rl.checkpoint.manifest import RankPart, read_checkpoint
from megatron_rl.checkpoint.shards import write_shard
from megatron_rl.errors import UserError
from tests.unit.checkpoint.conftest import Saving, state

Usage = namedtuple("Usage", "total used free")
MIB = 2**20


def assert_only_the_first_checkpoint_is_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_000001"]
    assert read_checkpoint(folder / "step_000001").state == state(1)


def test_too_little_space_is_noticed_before_anything_is_written(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving.save(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * MIB, 9 * MIB, MIB))
    saving.ranks.bytes = MIB * 3 // 2
    saving.ranks.fail = AssertionError("the ranks were asked to save")
    with pytest.raises(UserError, match=r"step_000002 \(1\.5 MiB needed, 1\.0 MiB free\).*resume=auto"):
        saving.save(2)
    assert_only_the_first_checkpoint_is_left(saving.folder)
    saving.ranks.bytes, saving.ranks.fail = MIB, None  # exactly enough
    saving.save(2)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_may_fill_up_while_a_rank_writes(saving: Saving, number: int, background: bool) -> None:
    saving.save(1)
    saving.ranks.fail = OSError(number, os.strerror(number), "large")
    saving.ranks.bytes = MIB
    for step in (1, 2):
        message = rf"step_00000{step} \(1\.0 MiB needed; {os.strerror(number)}\)"
        with pytest.raises(UserError, match=message), saving.saver() as saver:
            saver.save(state(step), {}, background=background)
        assert_only_the_first_checkpoint_is_left(saving.folder)


def test_another_error_is_not_reported_as_a_full_disk(saving: Saving) -> None:
    saving.ranks.fail = OSError(errno.EIO, "Input/output error")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: Input/output error"):
        saving.save(1)
    assert list(saving.folder.iterdir()) == []


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
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_real_file_system_that_is_full(tiny_disk: Path) -> None:
    saving = Saving(tiny_disk)
    saving.save(1)
    write_small = saving.ranks.write_state

    def write_too_much(folder: Path) -> list[RankPart]:
        entry = write_shard(folder / "w.safetensors", "weights", {"w": torch.zeros(MIB // 2)})
        return [RankPart({"w.safetensors": entry}, rng.capture(), 0)]

    saving.ranks.write_state = write_too_much  # type: ignore[method-assign]
    saving.ranks.bytes = 2 * MIB
    with pytest.raises(UserError, match=r"step_000002 \(2\.0 MiB needed, (0\.9|1\.0) MiB free\)"):
        saving.save(2)
    saving.ranks.bytes = 100
    with pytest.raises(UserError, match=r"step_000002 \(0\.0 MiB needed; No space left on device\)"):
        saving.save(2)
    assert_only_the_first_checkpoint_is_left(tiny_disk)
    saving.ranks.write_state = write_small  # type: ignore[method-assign]
    saving.save(2)
