"""`megatron-rl train`: trains a model, or checks a configuration with `--dry-run`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .arguments import add_config


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
    parser.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> None:
    from megatron_rl.config import expand, load_config

    config = load_config(options.config, [*_mode(options), *options.overrides])
    if options.dry_run:
        print(expand(config), end="")
        from megatron_rl.run.dry_run import dry_run

        dry_run(config, str(options.config))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the processes of a run share the machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from megatron_rl.loop import train

    train(config)


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
