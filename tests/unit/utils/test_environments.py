"""What torch finds in another environment, and whether two environments go together. GPUs are pretended."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.utils.environments import Environment, Question, driver_problem, nccl_problem

ACTOR = Environment("/usr/bin/python3", "2.13.0a0", "13.3", "2.30.4", "/usr/lib/libnccl.so.2", "13.3")
ENGINE = Environment("/opt/engine/bin/python", "2.14.1", "13.0", "2.30.7", "/opt/engine/nccl/libnccl.so.2", "13.3")


def interpreter(path: Path, environment: Environment) -> Path:
    """A stand-in for an interpreter: it answers with the environment, whatever it is asked."""
    fields = {name: value for name, value in asdict(environment).items() if name != "python"}
    path.write_text(f"#!/bin/sh\necho '{json.dumps(fields)}'\n")
    path.chmod(0o755)
    return path


def test_a_real_environment_answers() -> None:
    found = Question(sys.executable, {}).answer()
    assert (found.torch, found.cuda) == (torch.__version__, torch.version.cuda)
    if torch.version.cuda is None:
        assert found.nccl is None and found.library is None


def test_the_servers_variables_reach_the_interpreter(tmp_path: Path) -> None:
    program = tmp_path / "python"
    nothing = ', "cuda": null, "nccl": null, "library": null, "driver": null'
    program.write_text(f"#!/bin/sh\necho '{{\"torch\": \"'$MINE'\"{nothing}}}'\n")
    program.chmod(0o755)
    assert Question(str(program), {"MINE": "2.13"}).answer().torch == "2.13"


def test_a_broken_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none cannot be started: No such file"):
        Question(str(tmp_path / "none"), {})
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.13' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match="cannot import torch: ImportError: libcudart"):
        Question(str(broken), {}).answer()


@pytest.mark.parametrize(
    ("actor", "engine", "runs", "installs"),
    [
        ("2.30.4", "2.30.7", ACTOR.python, "nvidia-nccl-cu13==2.30.7"),
        ("2.30.7", "2.29.7", ENGINE.python, "nvidia-nccl-cu13==2.30.7"),
        ("2.9.9", "2.30.7", ACTOR.python, "nvidia-nccl-cu13==2.30.7"),
    ],
)
def test_two_versions_of_nccl_are_a_problem_and_the_newer_is_for_both(
    actor: str, engine: str, runs: str, installs: str
) -> None:
    problem = nccl_problem(replace(ACTOR, nccl=actor), replace(ENGINE, nccl=engine))
    assert problem and "ncclInvalidUsage" in problem.found and actor in problem.found and engine in problem.found
    assert f"{runs} -m pip install --no-deps {installs}" in problem.remedy and "LD_LIBRARY_PATH" in problem.remedy


def test_equal_or_unknown_versions_of_nccl_are_no_problem() -> None:
    assert nccl_problem(replace(ACTOR, nccl="2.30.7"), ENGINE) is None
    assert nccl_problem(replace(ACTOR, nccl=None), ENGINE) is None


def test_a_driver_is_judged_by_the_cuda_that_it_supports() -> None:
    assert driver_problem(ENGINE, "the engine") is None
    assert driver_problem(replace(ENGINE, driver="13.0", cuda="13.3"), "the engine") is None, "minor versions fit"
    assert driver_problem(replace(ENGINE, driver=None), "the engine") is None
    problem = driver_problem(replace(ENGINE, driver="12.8"), "the engine")
    assert problem and "supports CUDA 12.8" in problem.found and "the engine" in problem.found
    assert "driver 580 or newer" in problem.remedy and "torch for CUDA 12.x" in problem.remedy
