"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the file for what a command prints; see `printed_to`."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to this file what the command prints")


@contextmanager
def printed_to(path: Path | None) -> Iterator[None]:
    """Writes what the block prints to a file, and prints the file's path; without a path, the block prints as ever.

    Raises UserError if the file cannot be written. After any error, an older file is still there.
    """
    from megatron_rl.utils.files import atomically

    if path is None:
        yield
        return
    with atomically(path) as partial, partial.open("w", encoding="utf-8") as file, redirect_stdout(file):
        yield
    print(path)


def load_with_remarks(path: Path, overrides: Sequence[str]) -> Config:
    """Loads a configuration, and warns on standard error of settings that do nothing. Raises UserError."""
    from megatron_rl.config import load_config
    from megatron_rl.config.remarks import warn

    config = load_config(path, overrides)
    warn(config)
    return config
