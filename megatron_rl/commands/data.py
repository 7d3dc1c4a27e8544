"""`megatron-rl data prepare`: converts a published data set to this project's parquet format."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.data.published import Prepared


def add(commands: Any) -> None:
    """Declares `data prepare`."""
    data = commands.add_parser("data", help="convert published data sets to this project's parquet format")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="check, deduplicate and convert a published data set")
    prepare.add_argument(
        "set", metavar="SET", help="dapo-math-17k, aime-2024, aime-2025, math-500, minerva, olympiadbench"
    )
    prepare.add_argument(
        "--source",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a .parquet or .jsonl file; may be repeated",
    )
    prepare.add_argument("--output", "--out", type=Path, required=True, metavar="FILE.parquet")
    prepare.add_argument(
        "--problems", type=int, metavar="N", help="expected number of distinct problems; default: as published"
    )
    prepare.add_argument(
        "--sha256", action="append", metavar="HEX", help="expected checksum of each --source, in the same order"
    )
    prepare.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="model folder whose tokenizer --max-prompt-tokens uses"
    )
    prepare.add_argument("--max-prompt-tokens", type=int, metavar="N", help="leave out longer problems")
    prepare.set_defaults(command=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from megatron_rl.data.published import prepare

    console = Console()
    report = prepare(
        options.set,
        options.source,
        options.output,
        problems=options.problems,
        sha256=options.sha256,
        too_long=_length_filter(options.tokenizer, options.max_prompt_tokens),
        watch=lambda rows, name: track(rows, name, transient=True, console=console, disable=not console.is_terminal),
    )
    _show(console, report, options.output)


def _length_filter(tokenizer_folder: Path | None, most: int | None) -> Callable[[str], bool]:
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.errors import UserError

    if (tokenizer_folder is None) != (most is None):
        raise UserError("--tokenizer and --max-prompt-tokens go together; give both or neither")
    if tokenizer_folder is None or most is None:
        return lambda problem: False
    tokenizer = load_tokenizer(tokenizer_folder)
    return lambda problem: len(tokenizer.encode(problem, add_special_tokens=False)) > most


def _show(console: Any, report: Prepared, out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{report.title}: {out}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for source in report.sources:
        known = f"known: {source.known_as}" if source.known_as else "unknown; recorded"
        table.add_row(escape(source.name), f"{source.rows:,} rows, SHA-256 {source.sha256} ({known})")
    for reason, count in report.dropped.items():
        table.add_row("dropped", f"{count:,} ({reason})")
    table.add_row("kept", f"{report.kept:,} problems")
    problem, answer = report.example
    table.add_row("first problem", escape(problem))
    table.add_row("its answer", escape(answer))
    console.print(table)
