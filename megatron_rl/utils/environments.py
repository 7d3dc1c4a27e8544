"""The Python environments of a run, the actor's and the engine's: what each brings for GPUs, and whether they agree.

NCCL compares versions when a communicator is made, and ends with ncclInvalidUsage if two ranks differ (`init.cc`,
"Mismatched NCCL version detected"). Actor and engine are ranks of one communicator if weights are broadcast.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from packaging.version import Version

from megatron_rl.errors import UserError
from megatron_rl.utils.versions import oldest_driver

SECONDS = 300
"""Longest time for importing torch from a cold file system."""

# NCCL is asked through the library that torch has loaded: torch.cuda.nccl.version() is the version at compile time.
_ASK = """
import ctypes, json, torch

def number(library, function):
    value = ctypes.c_int()
    try:
        failed = getattr(ctypes.CDLL(library), function)(ctypes.byref(value))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else value.value

nccl = number("libnccl.so.2", "ncclGetVersion")
maps = [line.split()[-1] for line in open("/proc/self/maps") if "libnccl.so" in line]
driver = number("libcuda.so.1", "cuDriverGetVersion")
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "nccl": f"{nccl // 10000}.{nccl // 100 % 100}.{nccl % 100}" if nccl else None,
    "library": maps[0] if maps else None,
    "driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None,
}))
"""


@dataclass(frozen=True, slots=True)
class Environment:
    """What torch finds in one environment of one machine."""

    python: str
    """Path of the interpreter."""
    torch: str
    cuda: str | None
    """Version of CUDA that torch was built for; None for a CPU build."""
    nccl: str | None
    """Version of the NCCL that torch has loaded; None without one."""
    library: str | None
    """Path of that NCCL."""
    driver: str | None
    """Newest CUDA that the loaded driver library supports, forward compatibility included; None without a driver."""

    def __str__(self) -> str:
        return f"torch {self.torch}, CUDA {self.cuda}, NCCL {self.nccl} ({self.python})"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Something that does not go together, and what to do."""

    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}. {self.remedy}"


class Question:
    """Asks an interpreter about its torch while this process goes on; `answer` waits."""

    def __init__(self, python: str, environment: Mapping[str, str]) -> None:
        """`environment`: variables beside this process's own. Raises UserError if the interpreter cannot be started."""
        self.python = python
        try:
            self._process = subprocess.Popen(
                [python, "-c", _ASK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
            )
        except OSError as error:
            raise UserError(f"{python} cannot be started: {error.strerror}. Name an existing interpreter") from None

    def answer(self) -> Environment:
        """Raises UserError if the interpreter has no working torch."""
        return _answer(self.python, self._process)


def _answer(python: str, process: subprocess.Popen[bytes]) -> Environment:
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise UserError(f"{python} did not import torch within {SECONDS} s: is its file system reachable?") from None
    if process.returncode:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{python} cannot import torch: {last}")
    return Environment(python=python, **json.loads(output.splitlines()[-1]))


def driver_problem(environment: Environment, name: str) -> Mismatch | None:
    """Returns why the driver does not suit the CUDA of an environment, which `name` names; None if it does."""
    if not (environment.cuda and environment.driver):
        return None
    supported = int(environment.driver.split(".")[0])
    if supported >= int(environment.cuda.split(".")[0]):
        return None
    return Mismatch(
        f"the driver supports CUDA {environment.driver}, but torch {environment.torch} of {name} "
        f"({environment.python}) is built for CUDA {environment.cuda}",
        f"Install driver {oldest_driver(environment.cuda)} or newer, or a torch for CUDA {supported}.x there",
    )


def nccl_problem(actor: Environment, engine: Environment) -> Mismatch | None:
    """Returns why the two cannot be ranks of one NCCL communicator; None if they can.

    A newer NCCL serves a torch that was built with an older one, so both should use the newer of the two.
    """
    if actor.nccl == engine.nccl or not (actor.nccl and engine.nccl):
        return None
    newer, older = sorted((actor, engine), key=lambda one: Version(one.nccl or "0"), reverse=True)
    package = f"nvidia-nccl-cu{(older.cuda or '13').split('.')[0]}=={newer.nccl}"
    return Mismatch(
        f"NCCL is {actor.nccl} for the actor ({actor.library}) and {engine.nccl} for the engine ({engine.library}); a "
        "broadcast of weights between them would end with ncclInvalidUsage",
        f"Give both the newer one: {older.python} -m pip install --no-deps {package}. If its torch does not take NCCL "
        f"from pip, as in NVIDIA's images, put a folder that holds {newer.library} first in LD_LIBRARY_PATH instead. "
        "Or set weight_sync.transport=disk",
    )
