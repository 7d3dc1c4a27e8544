"""Execution of candidate programs in the jail."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from megatron_rl.config.reward import CodeSettings
from megatron_rl.errors import UserError
from megatron_rl.utils.files import remove_tree

from . import jail

JAIL = Path(jail.__file__)
LONGEST_OUTPUT = 2**20
"""Bytes of a candidate's output, and of the value of a call as JSON, that are read, unless a test expects more."""
LONGEST_MESSAGE = 200
"""Characters of an exception that a detail shows."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Mode = Literal["run", "call", "check", "probe", "session"]


@dataclass(frozen=True)
class Execution:
    """The result of one execution of a candidate."""

    output: str
    value: Any
    """Value in `result.json`; None if there is none."""
    is_cut: bool
    """Whether the output, or the value in modes other than `run`, was longer than what is read."""
    failure: str | None
    """"too slow", "killed by SIGSEGV", or the last line of the traceback; None if the candidate exited normally."""


class Sandbox:
    """A temporary folder for one candidate. Each run starts a new process, and the folder is deleted at the end."""

    def __init__(self, settings: CodeSettings, source: str) -> None:
        self._settings = settings
        self._source = source

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        remove_tree(self._folder)

    def run(
        self, mode: Mode, *, stdin: str = "", request: dict[str, Any] | None = None, longest: int = LONGEST_OUTPUT
    ) -> Execution:
        """Runs the candidate once: as a program with `stdin` in mode `run`, as `jail` describes in other modes.

        longest: bytes of the output or value that are read.
        """
        scratch = Path(tempfile.mkdtemp(dir=self._folder))
        # Python refuses a lone surrogate in the file, so that the candidate fails and not the verifier.
        (scratch / "solution.py").write_text(self._source, "utf-8", "surrogatepass")
        if request is not None:
            (scratch / "request.json").write_text(json.dumps(request))
        # Files without a name in the program's own folder, so that it can open them as /dev/stdin and /dev/stdout.
        with (
            tempfile.TemporaryFile(dir=scratch) as given,
            tempfile.TemporaryFile(dir=scratch) as output,
            tempfile.TemporaryFile(dir=scratch) as errors,
        ):
            given.write(stdin.encode())
            given.seek(0)
            process = start(self._settings, scratch, mode, given, output, errors)
            try:
                code: int | None = process.wait(self._settings.test_seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
                process.wait()
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read(longest).decode(errors="replace"))
            value, is_cut = _result(scratch, longest)
            if mode == "run":
                is_cut = os.fstat(output.fileno()).st_size > longest
        return Execution(texts[0], value, is_cut, _failure(code, texts[1]))


def start(settings: CodeSettings, scratch: Path, mode: Mode, stdin: Any, stdout: Any, stderr: Any) -> Any:
    """Starts the process of the jail."""
    command, options = invocation(settings, scratch, mode, settings.test_seconds)
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, **options)


def invocation(
    settings: CodeSettings, scratch: Path, mode: Mode, processor_seconds: float
) -> tuple[list[str], dict[str, Any]]:
    """Returns the command line of the jail's process, and the options that it must be started with."""
    limits = (str(settings.memory_mb), str(processor_seconds))
    environment = ENVIRONMENT | {"HOME": str(scratch), "TMPDIR": str(scratch)}
    command = [sys.executable, "-I", str(JAIL), str(scratch), *limits, mode, str(os.getpid())]
    return command, {"cwd": scratch, "env": environment, "start_new_session": True}


def check_sandbox(settings: CodeSettings) -> None:
    """Raises UserError if this machine cannot restrict a candidate as the settings require."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as scratch:
        process = start(settings, Path(scratch), "probe", subprocess.DEVNULL, subprocess.DEVNULL, subprocess.PIPE)
        _, errors = process.communicate()
    if process.returncode == jail.NO_LANDLOCK:
        if settings.require_landlock:
            raise UserError(
                "reward.name: code: this kernel has no Landlock, so a program could read and write your files. Use "
                "Linux 5.13 or newer with Landlock enabled, or accept the risk with reward.code.require_landlock=false"
            )
    elif process.returncode == jail.NO_SECCOMP:
        raise UserError(
            "reward.name: code: this machine does not allow seccomp filters (or is neither x86_64 nor aarch64), so a "
            "program could use the network and start processes. Grade programs elsewhere with reward.name=remote"
        )
    elif process.returncode != jail.LOCKED:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"reward.name: code: the sandbox does not start (exit code {process.returncode}): {last}")


def _result(scratch: Path, longest: int = LONGEST_OUTPUT) -> tuple[Any, bool]:
    """Returns the value in `result.json`, and whether the file is too long to be read."""
    try:
        # The candidate may have created anything under this name, so links are not followed and pipes do not block.
        handle = os.open(scratch / "result.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > longest:
                return None, stat.S_ISREG(status.st_mode)
            return json.loads(file.read(longest))["value"], False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, False  # there is no file, or the candidate wrote its own


def _failure(code: int | None, errors: str) -> str | None:
    if code == 0:
        return None
    if code is None or code == -signal.SIGXCPU:
        return "too slow"
    if code < 0:
        named = {known.value: known.name for known in signal.Signals}  # real-time signals have no names
        return f"killed by {named.get(-code, f'signal {-code}')}"
    return (errors.strip().splitlines() or [f"exit code {code}"])[-1][:LONGEST_MESSAGE]
