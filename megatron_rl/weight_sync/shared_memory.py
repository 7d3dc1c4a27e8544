"""Memory that all processes of a node share, as a folder: for engines on the node of the actor."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

PREFIX = "megatron-rl-weights-"


def shared_folder() -> Path:
    """A fresh folder in shared memory, or in the temporary folder where there is none to write to.

    Folders that runs which were killed left there are removed: memory is what they would cost.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for stale in parent.glob(f"{PREFIX}*"):
        owner = stale.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))
