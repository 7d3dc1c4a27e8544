"""`megatron-rl report`: writes report.html for one run, or for several runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


def add(commands: Any) -> None:
    """Declares `report`."""
    parser = commands.add_parser("report", help="write report.html for one run, or for several runs side by side")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run's folder, or in the working folder for several runs",
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from megatron_rl.observability.report import write_report

    for folder in options.folders:
        if folder.is_dir() and not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
            raise UserError(f"{folder}: holds no run: neither config.yaml nor metrics.jsonl is there")
    print(write_report(options.folders, options.output))
