"""Settings of NCCL that the actor and the engines must share, since they are members of one communicator.

SGLang sets the same values if they are unset; vLLM and torch leave them to NCCL, which decides otherwise.
"""

from __future__ import annotations

import os

AGREED = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""Environment variables, as SGLang 0.5.23 sets them. Members that disagree may wait for each other for ever."""


def agreed_environment() -> dict[str, str]:
    """Returns the environment variables for every process that uses NCCL; a value that the user has set stays."""
    return {name: os.environ.get(name, value) for name, value in AGREED.items()}
