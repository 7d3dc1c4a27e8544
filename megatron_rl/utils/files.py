"""Files and folders: atomic writes, temporary folders with an owner, and the log file of a process."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megatron_rl.errors import UserError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and moves the result to `path` if the block ends without an error.

    Readers therefore find either the old file or the complete new one. Raises UserError if the path is a folder, or the
    file system refuses the write (full, read-only, not permitted).
    """
    if not path.name or path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder. Give the path of a file.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # a failed clean-up must not hide the first error
            partial.unlink()


def write_error(path: Path, error: OSError) -> UserError:
    """The error for any file of a run folder that cannot be written."""
    reason = error.strerror or str(error)
    return UserError(
        f"cannot write {path}: {reason}. Free some space or fix the permissions, then continue with resume=auto."
    )


def owned_folder(prefix: str, parent: Path) -> Path:
    """Creates a temporary folder in `parent` whose name carries the id of this process.

    Folders with the same prefix whose processes have ended, for example because they were killed, are removed.
    """
    for leftover in parent.glob(f"{prefix}*"):
        owner = leftover.name.removeprefix(prefix).split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))


def redirect_output(log_file: Path) -> None:
    """Redirects the standard output and error of this process, including those of C libraries, to `log_file`."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sink = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
