"""Writing whole files: either the new one is there, or the old one still is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_rl.errors import UserError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on leaving without an error it takes the place of `path`.

    Errors: UserError when the file system refuses (full, read-only, not permitted).
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # the first error says more than a failed clean-up
            partial.unlink()


def write_error(path: Path, error: OSError) -> UserError:
    """The same plain words for every file of the run folder that cannot be written."""
    reason = error.strerror or str(error)
    return UserError(f"cannot write {path}: {reason}. Make room or permission there, then go on with resume=auto.")
