"""`megatron-rl checkpoints RUN`: what is there, and whether it is whole."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.checkpoint.manifest import Manifest


def add(commands: Any) -> None:
    """Declare `checkpoints`."""
    parser = commands.add_parser("checkpoints", help="list a run's checkpoints")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.set_defaults(command=_list)


def _list(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_rl.checkpoint.manifest import checkpoints

    folder = options.folder / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{options.folder}: no checkpoint in {folder}")
    table = Table(caption="sizes compared" if not options.verify else "checksums compared")
    for name in ("checkpoint", "written", "size", "evaluation", "layout", "state"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for path in found:
        table.add_row(*_row(path, options.verify))
    Console().print(table)


def _row(path: Path, verify_hashes: bool) -> list[str]:
    from megatron_rl.checkpoint.manifest import MANIFEST, read_manifest, verify

    written = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime)
    pointers = [link.name for link in path.parent.iterdir() if link.is_symlink() and link.resolve() == path.resolve()]
    row = [" ".join([path.name, *sorted(f"({name})" for name in pointers)]), f"{written:%Y-%m-%d %H:%M}"]
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [*row, "", "", "", f"DAMAGED: {error}"]
    row += [f"{manifest.bytes / 2**30:.2f} GiB", _evaluation(manifest), manifest.origin.layout_in_words]
    try:
        verify(path, manifest, hashes=verify_hashes)
    except UserError as error:
        return [*row, f"DAMAGED: {error}"]
    return [*row, "intact" if verify_hashes else "complete"]


def _evaluation(manifest: Manifest) -> str:
    from megatron_rl.observability.format import number

    values = {
        name.removeprefix("eval/"): value
        for name, value in manifest.metrics.items()
        if name.startswith("eval/") and "/avg@" in name
    }
    return "\n".join(f"{name} {number(value)}" for name, value in values.items())
