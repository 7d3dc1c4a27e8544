"""`megatron-rl train`: trains a model, or checks a configuration with `--dry-run`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

from .arguments import add_config

if TYPE_CHECKING:
    from megatron_rl.config import Config


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
    from megatron_rl.config import check_inputs, expand, load_config
    from megatron_rl.models.layout_check import check_layout

    config = load_config(options.config, [*_mode(options), *options.overrides])
    if options.dry_run:
        print(expand(config), end="")
        check_inputs(config, prepared=False, weights=False)
        check_layout(config)
        _show_prompt(config)
        _show_passes(config)
        print(f"# {options.config}: nothing wrong found", file=sys.stderr)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the processes of a run share the machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The first line comes before torch is imported, which takes seconds.
    print(f"{config.run.name}: {config.algorithm.name}, {config.train.steps} steps, starting", flush=True)
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


def _show_prompt(config: Config) -> None:
    """Prints the first prompt, unless `prepare` has not written its file yet."""
    from megatron_rl.data.prompts import first_prompt

    if config.data.train.is_file() and config.model.path.is_dir():
        text = first_prompt(config.data.train, model_folder=config.model.path, settings=config.data)
        print(f"# first prompt, as the model will see it (data.template: {config.data.template}):", file=sys.stderr)
        print(text, file=sys.stderr)


def _show_passes(config: Config) -> None:
    """Prints which forwards a step runs, unless they depend on a user's own loss that cannot be imported here."""
    from megatron_rl.config.passes import passes_of

    try:
        print(f"# {passes_of(config)}", file=sys.stderr)
    except UserError as error:
        print(f"# forwards of a step: not known here: {error}", file=sys.stderr)
