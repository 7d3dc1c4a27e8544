"""The package of an engine's server, in the environment that the server is started from."""

from __future__ import annotations

import os
import subprocess
import sys

from megatron_rl.config.rollout import ServerSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.engines.kind import ServerKind

SECONDS = 60
"""Longest time that the interpreter may take to answer."""

_ASK = """
import importlib.metadata as m
there = {d.metadata["Name"]: d.version for d in m.distributions()}
print(next((there[name] for name in (NAME, NAME + "-cpu") if name in there), ""))
"""


def interpreter_of(server: ServerSettings) -> str:
    """Returns the interpreter that the server is started with."""
    return str(server.python or sys.executable)


def server_version(kind: ServerKind, server: ServerSettings) -> str:
    """Returns the installed version of the server's package.

    Raises UserError if the interpreter cannot be started, or its environment lacks the package.
    """
    python = interpreter_of(server)
    try:
        command = [python, "-c", _ASK.replace("NAME", repr(kind.package))]
        environment = os.environ | server.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS)
    except OSError as error:
        raise UserError(
            f"rollout.server.python: {python} cannot be started: {error.strerror}; set it to the interpreter of the "
            "engine's environment"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"rollout.server.python: {python} did not answer within {SECONDS} s") from None
    if version := done.stdout.strip():
        return version
    raise UserError(
        f"rollout.engine: {kind.name} is not installed for {python} (rollout.server.python: {python}); on a CPU, "
        "`make engines` in a clone installs it into .venv-engines: train with .venv-engines/bin/megatron-rl, or set "
        "rollout.server.python=.venv-engines/bin/python. On GPUs, install it into an environment of its own, and set "
        "rollout.server.python to its interpreter"
    )
