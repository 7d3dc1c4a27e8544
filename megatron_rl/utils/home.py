"""A home folder for processes in containers that have none: JIT compilers keep their caches there.

FlashInfer, Triton, Inductor, vLLM, SGLang and the driver write below the home folder by default. Pyxis without a home,
a user id that the image does not know, or a read-only image leave them without one, and their first kernel fails.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from megatron_rl.errors import UserError


def provide_home() -> Path | None:
    """Points HOME to a folder on the local disk if the home folder is not writable. Returns that folder, or None.

    Processes of the same user on a machine share the folder, and it stays: kernels are compiled once. Raises UserError
    if no temporary folder is writable either.
    """
    home = os.environ.get("HOME")
    if home and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return None
    folder = private_folder(f"megatron-rl-home-{os.getuid()}")
    os.environ["HOME"] = str(folder)
    # Inductor asks for the user's name, which does not exist for an unknown user id.
    os.environ.setdefault("LOGNAME", str(os.getuid()))
    return folder


def private_folder(name: str, longest: int = 4095) -> Path:
    """Returns this user's folder among the temporary ones, or one with a longer name if that name is taken. Nobody else
    can write to it: its content is executed. Raises UserError if no temporary folder is writable.

    longest: bytes of the path; the folder is in /tmp if the path would be longer.
    """
    try:
        folder = Path(tempfile.gettempdir()) / name
        folder = folder if len(os.fsencode(folder)) <= longest else Path("/tmp") / name
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"HOME is {os.environ.get('HOME')}, which is not writable, and no temporary folder is either ({error}): "
            "set HOME or TMPDIR to a writable folder on a local disk, or mount a tmpfs at /tmp"
        ) from error
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if own else Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
