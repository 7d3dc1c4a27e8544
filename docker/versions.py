"""Lists what an image holds, and fails if it does not go together.

versions.py base: before anything is installed, whether torch and Transformer Engine of the base image are supported.
versions.py image FOLDER: versions and sizes of the actor's environment, and of the engine's if FOLDER holds one.
Run it in the root of the sources. It needs no GPU and no driver.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_rl.errors import UserError
from megatron_rl.utils.environments import Environment, Question, nccl_problem
from megatron_rl.utils.versions import BASE_IMAGES, SUPPORTED, all_outside, installed

ACTOR = ("transformer-engine", "apex", "flash-attn", "megatron-core", "transformers", "ray", "numpy", "triton")
ENGINE = ("sglang", "vllm", "sglang-router", "transformers", "flashinfer-python", "nvidia-nccl-cu13", "numpy", "triton")

_LIST = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"


def check_base() -> None:
    """Raises UserError if torch or Transformer Engine of the base image is missing or has an unsupported version."""
    brought = ("torch", "transformer-engine")
    wrong = [f"{name} is not installed" for name in brought if installed(name) is None] + all_outside(brought)
    if wrong:
        raise UserError(f"BASE: {'; '.join(wrong)}. Known to suit: {BASE_IMAGES}")


def list_image(folder: Path) -> None:
    """Prints both environments. Raises UserError if a version is not supported or if NCCL differs."""
    if wrong := all_outside(SUPPORTED):
        raise UserError("\n".join(wrong))
    actor = Question(sys.executable, {}).answer()
    _show("actor", actor, ACTOR)
    if folder.is_dir():
        servers = Question(str(folder / "bin/python"), {}).answer()
        _show("engine", servers, ENGINE)
        if mismatch := nccl_problem(actor, servers):
            raise UserError(f"NCCL: {mismatch}")


def _show(name: str, environment: Environment, packages: tuple[str, ...]) -> None:
    done = subprocess.run([environment.python, "-c", _LIST], capture_output=True, text=True, check=True)
    there = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    versions = {found.lower().replace("_", "-"): version for found, version in there.items()}
    print(f"{name}: {environment}")
    print("  " + ", ".join(f"{package} {versions.get(package, 'not installed')}" for package in packages))
    print(f"  {_gigabytes(environment.python):.1f} GB in {len(versions)} packages")


def _gigabytes(python: str) -> float:
    """Returns the size of the folder into which pip installs for an interpreter."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = python == sys.executable
    folder = sysconfig.get_path("purelib") if own else subprocess.check_output([python, "-c", ask], text=True).strip()
    return sum(path.lstat().st_size for path in Path(folder).rglob("*")) / 1e9


def main(arguments: list[str]) -> int:
    """Runs one of the two commands; returns the exit status."""
    try:
        match arguments:
            case ["base"]:
                check_base()
            case ["image", folder]:
                list_image(Path(folder))
            case _:
                raise UserError("usage: versions.py base | versions.py image FOLDER")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
