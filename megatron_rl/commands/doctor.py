"""`megatron-rl doctor`: checks of this machine and, with a configuration, of its cluster."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_config, add_output, load_with_remarks, printed_to


def add(commands: Any) -> None:
    """Declares `doctor`."""
    parser = commands.add_parser("doctor", help="look for problems that would keep a run from starting or finishing")
    add_config(parser, optional=True)
    parser.add_argument("--quick", action="store_true", help="check this machine only, in about a second")
    add_output(parser)
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_rl.doctor.examine import examine
    from megatron_rl.doctor.findings import show

    config = load_with_remarks(options.config, options.overrides) if options.config else None
    findings = examine(config, quick=options.quick)
    with printed_to(options.output):
        return 0 if show(findings, Console()) else 1
