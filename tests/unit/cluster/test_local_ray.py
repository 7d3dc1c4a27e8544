"""A Ray of one machine has its folder and its token for its user alone."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from ray._private import ray_constants

from megatron_rl.cluster import local_ray
from megatron_rl.cluster.local_ray import LOOPBACK_VARIABLE, TOKEN_VARIABLE, close_default_token, private_ray


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(local_ray, "LONGEST_FOLDER", 4095)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(TOKEN_VARIABLE, "")  # for its restoration
    for variable in (TOKEN_VARIABLE, "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_TMPDIR", LOOPBACK_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_token_are_for_the_user_alone_and_ray_listens_on_loopback(temporary: Path) -> None:
    folder = temporary / f"mrl-ray-{os.getuid()}"
    with private_ray() as options:
        assert options == {"_temp_dir": str(folder / "r")}
        assert not ray_constants.ENABLE_RAY_CLUSTER and os.environ[LOOPBACK_VARIABLE] == "0"
    assert ray_constants.ENABLE_RAY_CLUSTER and LOOPBACK_VARIABLE not in os.environ
    token = Path(os.environ[TOKEN_VARIABLE])
    assert (mode(folder), mode(token), token.parent) == (0o700, 0o600, folder)
    assert len(token.read_text()) == 64 and list(folder.iterdir()) == [token]
    del os.environ[TOKEN_VARIABLE]
    before = token.read_text()
    with private_ray():
        assert token.read_text() == before


def test_a_folder_that_another_user_could_have_made_is_not_used(temporary: Path) -> None:
    taken = temporary / f"mrl-ray-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    with private_ray() as options:
        assert Path(options["_temp_dir"]).parent != taken and mode(Path(options["_temp_dir"]).parent) == 0o700


def test_a_long_temporary_folder_leaves_no_room_for_the_names_of_sockets(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system may set TMPDIR to a long path. Ray refuses sockets of more than 107 bytes."""
    monkeypatch.setattr(local_ray, "LONGEST_FOLDER", 40)
    with private_ray() as options:
        socket = f"{options['_temp_dir']}/session_2026-11-30_16-40-53_828644_4194304/sockets/plasma_store"
        assert len(socket) <= 107 and options["_temp_dir"].startswith("/tmp/mrl-ray-")


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "mine")
    monkeypatch.setenv("RAY_TMPDIR", "/mine")
    with private_ray() as options:
        assert options == {} and os.environ[TOKEN_VARIABLE] == "mine"
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:5")
    with private_ray() as options:
        assert options == {} and ray_constants.ENABLE_RAY_CLUSTER


def test_ray_s_own_token_is_closed_to_others(temporary: Path) -> None:
    close_default_token()
    path = temporary / ".ray/auth_token"
    path.parent.mkdir()
    path.write_text("t")
    path.chmod(0o644)
    close_default_token()
    assert mode(path) == 0o600
