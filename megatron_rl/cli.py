"""The command line: builds the parser from the modules in `commands/` and dispatches to one of them."""

from __future__ import annotations

import argparse
import sys

from megatron_rl import __version__
from megatron_rl.commands import (
    checkpoints,
    convert,
    data,
    doctor,
    evaluate,
    init,
    plan,
    push,
    report,
    slurm,
    status,
    train,
    view,
)
from megatron_rl.errors import UserError

COMMANDS = (init, train, plan, doctor, slurm, report, status, view, checkpoints, data, convert, evaluate, push)
"""In the order in which `megatron-rl --help` lists them."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a check failed or ranks were lost, 2 for an error that the user can fix, 130 if
    interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse accepts no overrides after an option
        if any(text.startswith("-") for text in rest) or "overrides" not in options:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        return options.command(options) or 0
    except UserError as error:
        sys.stdout.flush()  # the error stands last, also where both streams go to one file
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except PermissionError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: permission denied for this user", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-rl", description="RLVR on Megatron, with Lp-Reg.")
    parser.add_argument("--version", action="version", version=f"megatron-rl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
