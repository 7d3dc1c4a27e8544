from __future__ import annotations

import shutil
import subprocess

from megatron_rl.weight_sync.folder import PREFIX, shared_folder


def test_shared_folders_are_new() -> None:
    first, second = shared_folder(), shared_folder()
    assert first != second and first.is_dir()
    for folder in (first, second):
        folder.rmdir()


def test_folders_of_killed_runs_are_removed_and_those_of_living_runs_kept() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    living = shared_folder()
    stale = living.with_name(f"{PREFIX}{ended.pid}-abc")
    stale.mkdir()
    try:
        other = shared_folder()
        assert not stale.exists()
        assert living.is_dir() and other.is_dir()
    finally:
        for folder in (living, stale, other):
            shutil.rmtree(folder, ignore_errors=True)
