"""Removing a folder ends, also if the folder cannot be removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_rl.utils.files import remove_tree


def test_a_folder_that_cannot_be_removed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount point, or a folder in a place where the user may not delete."""
    folder, rmdir = tmp_path / "kept", os.rmdir
    (folder / "a/b").mkdir(parents=True)
    (folder / "a/b/file").touch()

    def refuse(path: object) -> None:
        if Path(str(path)) == folder:
            raise OSError(errno.EBUSY, "busy", str(path))
        rmdir(str(path))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(OSError, match="busy"):
        remove_tree(folder)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    remove_tree(folder)
    assert not folder.exists()
