"""Memory that all processes of a node share, as a folder: for engines on the node of the actor."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_rl.utils.files import owned_folder

PREFIX = "megatron-rl-weights-"


def shared_folder() -> Path:
    """A fresh folder in shared memory, or in the temporary folder where there is none to write to.

    Those that runs which were killed left there are removed: memory is what they would cost.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return owned_folder(PREFIX, parent)
