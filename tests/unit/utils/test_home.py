"""Processes without a writable home folder get one on the local disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.utils.home import provide_home


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))  # for its restoration
    monkeypatch.setenv("LOGNAME", "me")
    return tmp_path


def test_a_writable_home_is_kept(temporary: Path) -> None:
    assert provide_home() is None and os.environ["HOME"] == str(temporary)


@pytest.mark.parametrize("home", [None, "", "/none", "/proc"])
def test_a_home_that_cannot_be_written_is_replaced(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path).startswith(str(temporary))
    )  # root may write anywhere
    monkeypatch.setenv("HOME", home) if home is not None else monkeypatch.delenv("HOME")
    monkeypatch.delenv("LOGNAME")
    folder = provide_home()
    assert folder and folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
    assert os.environ["HOME"] == str(folder) and os.environ["LOGNAME"] == str(os.getuid())
    monkeypatch.delenv("HOME")
    assert provide_home() == folder, "the next process finds the compiled kernels"


def test_a_folder_that_others_could_fill_is_not_used(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = temporary / f"megatron-rl-home-{os.getuid()}"
    trap.mkdir(mode=0o700)
    trap.chmod(0o777)
    monkeypatch.delenv("HOME")
    folder = provide_home()
    assert folder and folder != trap and folder.stat().st_mode & 0o777 == 0o700


def test_no_writable_folder_at_all_is_an_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(tempfile, "tempdir", "/none")
    with pytest.raises(UserError, match="mount a tmpfs at /tmp"):
        provide_home()
