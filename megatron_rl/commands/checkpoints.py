"""`megatron-rl checkpoints`: lists the checkpoints of a run and checks that they are complete."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

from .arguments import add_output, printed_to

if TYPE_CHECKING:
    from megatron_rl.checkpoint.manifest import Manifest


def add(commands: Any) -> None:
    """Declares `checkpoints`."""
    parser = commands.add_parser("checkpoints", help="list the checkpoints of a run and check that they are complete")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    add_output(parser)
    parser.set_defaults(command=_list)


def _list(options: argparse.Namespace) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from megatron_rl.checkpoint.manifest import checkpoints

    folder = options.folder / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{options.folder}: no checkpoint in {folder}; give the folder of a run, such as runs/<name>")
    table, problems, layouts = Table(box=SIMPLE_HEAD), list[str](), set[str]()
    for name in ("checkpoint", "written", "GiB", "state", "evaluation"):
        table.add_column(name, justify="right" if name == "GiB" else "left", no_wrap=name in ("checkpoint", "state"))
    for path in found:
        try:
            manifest = _checked(path, options.verify)
        except UserError as error:
            table.add_row(*_name(path), "", "DAMAGED", "")
            problems.append(str(error))
            continue
        layouts.add(manifest.origin.layout_in_words)
        size, state = f"{manifest.bytes / 2**30:.2f}", "intact" if options.verify else "complete"
        table.add_row(*_name(path), size, state, _evaluation(manifest))
    with printed_to(options.output):
        Console().print(table)
        print(f"layout: {' or '.join(sorted(layouts))}; {'checksums' if options.verify else 'sizes'} compared")
        print(*problems, sep="\n")


def _name(path: Path) -> list[str]:
    """Returns the name of a checkpoint with the links to it, and the time at which it was written."""
    from megatron_rl.checkpoint.manifest import MANIFEST

    links = sorted(
        other.name for other in path.parent.iterdir() if other.is_symlink() and other.readlink().name == path.name
    )
    written = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime)
    return [" ".join([path.name, *(f"({name})" for name in links)]), f"{written:%m-%d %H:%M}"]


def _checked(path: Path, hashes: bool) -> Manifest:
    """Raises UserError if the checkpoint is damaged."""
    from megatron_rl.checkpoint.manifest import read_manifest, verify

    manifest = read_manifest(path)
    verify(path, manifest, hashes=hashes)
    return manifest


def _evaluation(manifest: Manifest) -> str:
    from megatron_rl.utils.format import number

    values = {
        name.removeprefix("eval/"): value
        for name, value in manifest.metrics.items()
        if name.startswith("eval/") and "/avg@" in name
    }
    return "\n".join(f"{name} {number(value)}" for name, value in values.items())
