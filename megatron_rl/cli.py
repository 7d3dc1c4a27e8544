"""The command line: `megatron-rl train CONFIG [key=value ...]` and `megatron-rl report RUN...`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.commands import checkpoints, convert, data, evaluate
from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where a check failed, 2 for what the user can mend, 130 when interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes no overrides after an option
        if any(text.startswith("-") for text in rest) or "overrides" not in options:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        return options.command(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-rl", description="RLVR on Megatron, with Lp-Reg.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a configuration file says")
    _takes_config(train)
    instead = train.add_mutually_exclusive_group()
    instead.add_argument(
        "--rollouts", type=Path, metavar="FOLDER", help="train on rollouts that a run recorded, without engines"
    )
    instead.add_argument("--rollout-only", action="store_true", help="sample, grade and record; train nothing")
    train.add_argument("--dry-run", action="store_true", help="check the configuration and its files, start nothing")
    train.set_defaults(command=_train)
    plan = commands.add_parser("plan", help="whether a run fits, who goes where, how long it takes; needs no GPU")
    _takes_config(plan)
    plan.add_argument("--search", action="store_true", help="rank the layouts that fit the same GPUs")
    plan.add_argument("--json", action="store_true", help="numbers in bytes and seconds")
    assume = "such as mean_response=3000; may be given again"
    plan.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help=assume)
    plan.set_defaults(command=_plan)
    doctor = commands.add_parser("doctor", help="look for what may keep a run from starting or finishing")
    _takes_config(doctor, optional=True)
    doctor.add_argument("--quick", action="store_true", help="only this machine, in about a second")
    doctor.set_defaults(command=_doctor)
    slurm = commands.add_parser("slurm", help="write the batch script of a run, for a cluster with Slurm")
    _takes_config(slurm)
    slurm.add_argument("--output", type=Path, metavar="FILE", help="default: <name of the run>.sbatch here")
    slurm.add_argument("--seeds", metavar="0-3", help="a job array: a run for each seed")
    slurm.add_argument("--doctor", action="store_true", help="a job that runs doctor on its nodes, and trains nothing")
    slurm.add_argument("--submit", action="store_true", help="and submit it")
    slurm.set_defaults(command=_slurm)
    report = commands.add_parser("report", help="write report.html of a run, or of several side by side")
    report.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the run's folder, or here for several runs"
    )
    report.set_defaults(command=_report)
    status = commands.add_parser("status", help="say what every process of a run is doing")
    status.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    status.set_defaults(command=_status)
    checkpoints.add(commands)
    data.add(commands)
    convert.add(commands)
    evaluate.add(commands)
    return parser


def _takes_config(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG.yaml", nargs="?" if optional else None)
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as actor.tensor_parallel=1")


def _train(options: argparse.Namespace) -> None:
    from megatron_rl.config import check_inputs, expand, load_config
    from megatron_rl.models.layout_check import check_layout

    config = load_config(options.config, [*_mode(options), *options.overrides])
    if options.dry_run:
        print(expand(config), end="")
        check_inputs(config, prepared=False, weights=False)
        check_layout(config)
        _show_prompt(config)
        print(f"# {options.config}: nothing wrong found", file=sys.stderr)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes share the machine
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from megatron_rl.loop import train

    train(config)


def _mode(options: argparse.Namespace) -> list[str]:
    """The overrides that an option stands for; those given win over them."""
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
    """One that `prepare` has yet to write is not shown."""
    from megatron_rl.data.prompts import first_prompt

    if config.data.train.is_file() and config.model.path.is_dir():
        text = first_prompt(config.data.train, model_folder=config.model.path, settings=config.data)
        print(f"# the first prompt, as the model will see it (data.template: {config.data.template}):", file=sys.stderr)
        print(text, file=sys.stderr)


def _plan(options: argparse.Namespace) -> None:
    from megatron_rl.commands.plan import print_plan
    from megatron_rl.config import load_config

    config = load_config(options.config, options.overrides)
    print_plan(config, assumptions=options.assume, search=options.search, as_json=options.json)


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_rl.config import load_config
    from megatron_rl.doctor.examine import examine
    from megatron_rl.doctor.findings import show

    config = load_config(options.config, options.overrides) if options.config else None
    return 0 if show(examine(config, quick=options.quick), Console()) else 1


def _slurm(options: argparse.Namespace) -> None:
    from megatron_rl.cluster.slurm import submit, write_script

    script = write_script(
        options.config, options.overrides, output=options.output, seeds=options.seeds, doctor=options.doctor
    )
    print(f"job {submit(script)} submitted: {script}" if options.submit else script)


def _report(options: argparse.Namespace) -> None:
    from megatron_rl.observability.report import write_report

    print(write_report(options.folders, options.output))


def _status(options: argparse.Namespace) -> None:
    from megatron_rl.utils import heartbeat

    beats = heartbeat.read_beats(options.folder / "logs" / heartbeat.FOLDER)
    if not beats:
        raise UserError(f"{options.folder}: no process of a run has left a heartbeat there")
    print(heartbeat.table(beats, time.time()))


if __name__ == "__main__":
    sys.exit(main())
