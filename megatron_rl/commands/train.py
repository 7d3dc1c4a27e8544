"""`megatron-rl train`: trains a model, or checks a configuration with `--dry-run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError

from .arguments import add_config, load_with_remarks


def add(commands: Any) -> None:
    """Declares `train`."""
    parser = commands.add_parser("train", help="train a model as described by a configuration file")
    add_config(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--rollouts", type=Path, metavar="FOLDER", help="train on the recorded rollouts of a run, without engines"
    )
    mode.add_argument(
        "--rollout-only", action="store_true", help="sample, grade and record responses without training on them"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and the files it names, then stop"
    )
    parser.add_argument(
        "--show-config",
        action="store_true",
        help="print the configuration with every default, and the source of every other value, then stop",
    )
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    from megatron_rl.config import expand, load_config

    overrides = [*_mode(options), *options.overrides]
    if options.show_config:
        print(expand(load_config(options.config, overrides)), end="")
        return
    if options.dry_run:
        from megatron_rl.data.hub import with_local_copies
        from megatron_rl.run.dry_run import dry_run

        config, missing = load_with_remarks(options.config, overrides), None
        try:
            config = with_local_copies(config, download=False)
        except UserError as error:  # all other checks are made nevertheless
            missing = error
        dry_run(config, str(options.config), missing)
        return
    from megatron_rl.api import train

    train(options.config, overrides)


def _mode(options: argparse.Namespace) -> list[str]:
    """Returns the overrides that an option stands for. Overrides on the command line take precedence over them."""
    if options.rollout_only:
        return ["train.rollout_only=true", "observability.rollouts_every=1"]
    if options.rollouts is None:
        return []
    from megatron_rl.rollout.replay import Replay

    steps = len(Replay(options.rollouts))
    return [
        f"rollout.replay={options.rollouts}",
        f"train.steps={steps}",
        "evaluation.suites={}",
        "evaluation.probes={}",
    ]
