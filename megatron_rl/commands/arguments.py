"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Adds the configuration file and its overrides to a command."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", nargs="?" if optional else None)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="override one key, such as actor.tensor_parallel=1"
    )
