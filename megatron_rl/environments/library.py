"""The import of a library of environments, with an error that says how to install it."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from megatron_rl.errors import UserError


class EnvironmentFailed(Exception):
    """An environment failed, so that the rollout has no reward. The message says what failed."""


def library(module: str, package: str) -> Any:
    """Returns a module of a library. Raises UserError if the library is not installed or cannot be imported."""
    if os.getcwd() not in sys.path:  # environments of the user's own are modules of the working folder
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {package} cannot be imported ({error}): pip install {package}") from error
