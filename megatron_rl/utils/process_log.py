"""A process's own log file."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def redirect_output(log_file: Path) -> None:
    """Send what this process prints, its libraries' output included, to a file of the run folder."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    sink = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
