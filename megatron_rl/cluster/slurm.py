"""Writes and submits the batch script of a run: one task per node, Ray on all nodes, the driver on the first one."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.models.layout_check import check_layout
from megatron_rl.parallel.placement import Placement, placement_of

LOG_FOLDER = "runs/slurm"
"""Folder of the logs of Ray on each node, with a folder per start of a job."""


def write_script(
    path: Path, overrides: list[str], *, output: Path | None, seeds: str | None, doctor: bool = False
) -> Path:
    """Writes the script that trains the configuration at `path` with the overrides.

    output: by default `<run.name>.sbatch`. seeds: indices of a job array, such as 0-3; each task is a run with its
    index as the seed. doctor: the job runs `megatron-rl doctor` on its nodes and trains nothing. Raises UserError if
    such a job is impossible.
    """
    if seeds and doctor:
        raise UserError("--seeds and --doctor cannot be combined: doctor checks the nodes once. Give only one of them.")
    config = load_config(path, overrides)
    check_layout(config)
    placement = placement_of(config)
    _check(config, placement, seeds)
    name = f"{config.run.name}-doctor" if doctor else config.run.name
    output = output or Path(f"{name}.sbatch")
    arguments = [str(path), *overrides, *([f"--seeds={seeds}"] if seeds else []), *(["--doctor"] if doctor else [])]
    text = _template().render(
        command=shlex.join(arguments),
        name=name,
        verb="doctor" if doctor else "train",
        folder=config.run.folder,
        log_folder=LOG_FOLDER,
        nodes=config.cluster.nodes,
        gpus=config.cluster.gpus_per_node if placement.on_gpu else 0,
        slurm=config.cluster.slurm,
        config=path,
        overrides=overrides,
        seeds=seeds,
    )
    try:
        output.write_text(text, encoding="utf-8")
        output.chmod(0o755)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    return output


def submit(script: Path) -> str:
    """Submits the script and returns the job's number. Raises UserError with the message of sbatch if it refuses."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"there is no sbatch here: submit {script} on a machine that has it") from None
    if done.returncode:
        raise UserError(f"{script} was refused: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("megatron_rl.cluster"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("slurm.sbatch.j2")


def _check(config: Config, placement: Placement, seeds: str | None) -> None:
    cluster, slurm = config.cluster, config.cluster.slurm
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", config.run.name):
        raise UserError(
            f"run.name: {config.run.name!r} becomes the job's name, which may contain only letters, digits and - _ ."
        )
    if seeds and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?", seeds):
        raise UserError(f"--seeds {seeds}: expected indices of a job array, such as 0-3 or 0,2,5 or 0-9%2")
    if len(placement.nodes) < cluster.nodes:
        raise UserError(
            f"cluster.nodes: {cluster.nodes} nodes are given, but actor ranks and engines use only "
            f"{len(placement.nodes)}"
        )
    if (slurm.container == "none") != (slurm.image is None):
        raise UserError("cluster.slurm.container and cluster.slurm.image go together: set both or neither")
    if slurm.signal_minutes >= (minutes := limit_minutes(slurm.time_limit)):
        raise UserError(
            f"cluster.slurm.signal_minutes: {slurm.signal_minutes} leaves nothing of the {minutes:.0f} minutes of "
            f"cluster.slurm.time_limit: {slurm.time_limit}. Lower the former or raise the latter."
        )


def limit_minutes(time_limit: str) -> float:
    days, _, clock = time_limit.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60
