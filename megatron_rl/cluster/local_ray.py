"""A Ray of this machine alone: it listens on loopback, with a token and a folder that only this user can read.

Written for Ray 2.60. Ray itself listens on every interface, makes its folder writable for everybody, and writes its
token to a file that everybody may read.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_rl.utils.home import private_folder

LOOPBACK_VARIABLE, TOKEN_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_TOKEN_PATH"

LONGEST_FOLDER = 40
"""Bytes of the folder's path. A Unix socket may have 107, of which the names of Ray's session and sockets take 66."""


@contextmanager
def private_ray() -> Iterator[dict[str, Any]]:
    """Yields the options of `ray.init`, which is to be called within the block. What the user has set stays, and a Ray
    that RAY_ADDRESS names needs no options."""
    from ray._private import ray_constants

    if os.environ.get("RAY_ADDRESS"):
        yield {}
        return

    folder = private_folder(f"mrl-ray-{os.getuid()}", LONGEST_FOLDER)
    folder.chmod(0o700)
    if not {TOKEN_VARIABLE, "RAY_AUTH_TOKEN"} & os.environ.keys():
        os.environ[TOKEN_VARIABLE] = str(_token_file(folder))
    close_default_token()
    # The name of this switch tells its origin: macOS asks about programs that listen for other machines. Ray reads it
    # when it is imported, which may have happened long ago.
    before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(LOOPBACK_VARIABLE)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[LOOPBACK_VARIABLE] = "0"
    try:
        yield {} if "RAY_TMPDIR" in os.environ else {"_temp_dir": str(folder / "r")}
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[0]
        del os.environ[LOOPBACK_VARIABLE]
        if before[1] is not None:
            os.environ[LOOPBACK_VARIABLE] = before[1]


def _token_file(folder: Path) -> Path:
    """The token of this user's own Rays on this machine. Runs share it, since a process reads it only once."""
    path = folder / "token"
    with suppress(FileExistsError):
        fresh = path.with_name(f"token-{os.getpid()}-{secrets.token_hex(4)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(fresh, path)
        finally:
            fresh.unlink()
    return path


def close_default_token() -> None:
    """Makes the token that Ray has written into the home folder readable for its owner only."""
    path = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):  # there is none, or it is another user's
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
