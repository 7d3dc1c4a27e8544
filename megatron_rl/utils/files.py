"""Files and folders: atomic writes, temporary folders with an owner, and the log file of a process."""

from __future__ import annotations

import os
import secrets
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
            with suppress(OSError):  # another user's folder
                remove_tree(leftover)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))


def remove_tree(folder: Path) -> None:
    """Removes a folder whose contents a program made that nobody trusts: folders nested by the thousand, of which
    `shutil.rmtree` gives up, and folders without permissions.

    Every inner folder is emptied into the outer one, so that no path grows long. Links are not followed. Raises OSError
    if the folder cannot be removed; a folder that does not exist is none.
    """
    number, mark = 0, secrets.token_hex(8)
    while folder.is_dir():
        before = number
        for entry in os.scandir(folder):
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in os.scandir(entry.path):
                number += 1
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # a folder moves only if it is writable, since its `..` changes
                os.rename(inner.path, folder / f".{mark}-{number}")
            os.rmdir(entry.path)
        try:
            os.rmdir(folder)
        except OSError:
            if number == before:  # otherwise the renamed entries are still in it
                raise


def redirect_output(log_file: Path) -> None:
    """Redirects the standard output and error of this process, including those of C libraries, to `log_file`."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sink = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
