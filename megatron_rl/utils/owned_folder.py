"""Temporary folders that know whose they are, so that those of processes which were killed can be removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil


def owned_folder(prefix: str, parent: Path) -> Path:
    """A fresh folder of this process in `parent`; those of the same prefix whose owners have ended are removed."""
    for stale in parent.glob(f"{prefix}*"):
        owner = stale.name.removeprefix(prefix).split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
