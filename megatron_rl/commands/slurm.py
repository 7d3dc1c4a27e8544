"""`megatron-rl slurm`: writes the batch script of a run, and submits it if asked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_config


def add(commands: Any) -> None:
    """Declares `slurm`."""
    parser = commands.add_parser("slurm", help="write the batch script of a run for a Slurm cluster")
    add_config(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: <name of the run>.sbatch in the working folder"
    )
    parser.add_argument("--seeds", metavar="0-3", help="write a job array with one run per seed")
    parser.add_argument(
        "--doctor", action="store_true", help="write a job that runs doctor on its nodes instead of training"
    )
    parser.add_argument("--submit", action="store_true", help="submit the script with sbatch")
    parser.set_defaults(command=_slurm)


def _slurm(options: argparse.Namespace) -> None:
    from megatron_rl.cluster.slurm import submit, write_script

    script = write_script(
        options.config, options.overrides, output=options.output, seeds=options.seeds, doctor=options.doctor
    )
    print(f"job {submit(script)} submitted: {script}" if options.submit else script)
