"""Runs a Python script on CUDA that is the CPU, with real Transformer Engine Python and real megatron-core.

    .venv-rehearsal/bin/python -m tests.rehearsal [--engine 2.20.2] [--megatron 0.19.2] [--plain] -- COMMAND ...

COMMAND is a script with its arguments, or `-m module ...`; with `--exec` it is any program, such as `bash session.sh`.
Everything that it starts in turn is rehearsed too, since all of it is in the environment: PYTHONPATH, whose first
folder holds a sitecustomize.py, and MEGATRON_RL_REHEARSAL. In a shell,

    eval "$(.venv-rehearsal/bin/python -m tests.rehearsal --print)"

sets the same for what follows. `--engine none` leaves Transformer Engine out. `--plain` runs on the CPU as what it is,
for comparison; Transformer Engine is there or not as `--engine` says.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from tests.rehearsal.versions import ENGINES, MEGATRONS, NEWEST, folder_of

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def environment(engine: str | None, megatron: str, *, plain: bool = False) -> dict[str, str]:
    """Returns the environment variables of a rehearsal, beside those that are set already."""
    paths = [folder_of("megatron-core", megatron), ROOT]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if not plain or engine is not None:
        paths = [HERE / "site", *paths]
        settings |= {"MEGATRON_RL_REHEARSAL": "cpu" if plain else "cuda", "TORCH_COMPILE_DISABLE": "1"}
    if engine is not None:
        paths += [folder_of("transformer-engine", engine), HERE / "stand_ins"]
        settings |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0"}  # nothing of it is compiled
    return settings | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal")
    parser.add_argument("--engine", choices=[*ENGINES, "none"], default=NEWEST[0])
    parser.add_argument("--megatron", choices=MEGATRONS, default=NEWEST[1])
    parser.add_argument("--plain", action="store_true", help="on the CPU as what it is")
    parser.add_argument("--print", action="store_true", help="print the environment for a shell")
    parser.add_argument("--exec", action="store_true", help="COMMAND is a program, not a Python script")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    engine = None if chosen.engine == "none" else chosen.engine
    settings = environment(engine, chosen.megatron, plain=chosen.plain)
    if chosen.print:
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items()))
        return
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        parser.error("name a script to run")
    program = command if chosen.exec else [sys.executable, *command]
    os.execvpe(program[0], program, os.environ | settings)


if __name__ == "__main__":
    main()
