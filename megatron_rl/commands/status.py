"""`megatron-rl status`: what every process of a run is doing."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


def add(commands: Any) -> None:
    """Declares `status`."""
    parser = commands.add_parser("status", help="show what every process of a run is doing")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> None:
    from megatron_rl.utils import heartbeat

    beats = heartbeat.read_beats(options.folder / "logs" / heartbeat.FOLDER)
    if not beats:
        raise UserError(f"{options.folder}: no heartbeats here; give the folder of a run, such as runs/<name>")
    print(heartbeat.table(beats, time.time()))
