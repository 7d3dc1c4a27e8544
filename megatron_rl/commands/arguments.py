"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_rl.config import Config


def add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Adds the configuration file and its overrides to a command."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", nargs="?" if optional else None)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="override one key, such as actor.tensor_parallel=1"
    )


def load_with_remarks(path: Path, overrides: Sequence[str]) -> Config:
    """Loads a configuration, and warns on standard error of settings that do nothing. Raises UserError."""
    from megatron_rl.config import load_config
    from megatron_rl.config.remarks import warn

    config = load_config(path, overrides)
    warn(config)
    return config
