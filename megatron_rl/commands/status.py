"""`megatron-rl status`: how far a run is, what its processes are doing, or how it ended."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


def add(commands: Any) -> None:
    """Declares `status`."""
    parser = commands.add_parser("status", help="show how far a run is, what its processes are doing, or how it ended")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> None:
    from megatron_rl.observability.state import progress, read_state
    from megatron_rl.utils import heartbeat

    folder, now = options.folder, time.time()
    beats = heartbeat.read_beats(folder / "logs" / heartbeat.FOLDER)
    state = read_state(folder)
    if not beats and state is None and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no run here; give the folder of a run, such as runs/<name>")
    for name, value in progress(folder, now):
        print(f"{name:<8}{value}")
    if beats and not (state and state.ended):
        print("processes")
        print(heartbeat.table(beats, now))
