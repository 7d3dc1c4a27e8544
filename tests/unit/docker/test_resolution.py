"""Both environments of the GPU image resolve: pip runs the image's own scripts, but installs nothing.

Packages of the base image are stand-ins that have a name and a version only. pip reads the metadata of wheels without
the wheels (`fast-deps`), some megabytes in all. The image itself was never built, so nothing else of it is tested here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_rl.rollout.engines.kind import ServerKind, engine_kind
from megatron_rl.utils.versions import DRIVERS
from tests.tiers import slow
from tests.unit.docker.dockerfile import DOCKERFILE, ROOT, arguments, copied, stage

GPU = stage("cuda")
GIVEN = arguments(GPU)

# What users of NVIDIA's images print. A distribution's version is longer than that of the imported torch.
BASES = {
    "nvcr.io/nvidia/pytorch:25.06-py3": {"torch": "2.8.0a0+5228986c39.nv25.6.1", "transformer-engine": "2.4.0+3cd6870"},
    "nvcr.io/nvidia/pytorch:26.06-py3": {
        "torch": "2.13.0a0+8145d630e8.nv26.6.1",
        "transformer-engine": "2.16.0+4220403e",
        "numpy": "2.1.0",
        "triton": "3.7.1+git1.nv26.6.1",
        "PyYAML": "6.0.1",
    },
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `python3` whose pip resolves without downloading wheels (23.3), with setuptools as in a base."""
    folder = tmp_path_factory.mktemp("python")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = ["pip>=23.3", "setuptools>=77", "packaging", "wheel"]
    subprocess.run([folder / "bin/python3", "-m", "pip", "install", "-q", "--upgrade", *packages], check=True)
    return folder / "bin"


def run(
    script: str, argument: Path, python: Path, variables: Mapping[str, str], folder: Path = ROOT
) -> tuple[int, str]:
    """Runs one of the image's scripts in a folder with pip only pretending. Returns its status and output."""
    path = {"PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": ""}
    pretend = {"PIP_DRY_RUN": "1", "PIP_USE_FEATURE": "fast-deps", "PIP_PROGRESS_BAR": "off"}
    done = subprocess.run(
        [folder / "docker" / script, argument],
        env=os.environ | path | pretend | GIVEN | dict(variables),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    return done.returncode, done.stdout


def would_install(output: str) -> list[dict[str, str]]:
    """Returns what each call of pip would install: the name of a package -> its version."""
    lines = re.findall(r"^Would install (.*)$", output, re.MULTILINE)
    return [dict(_split(word) for word in line.split()) for line in lines]


def _split(word: str) -> tuple[str, str]:
    name, _, version = word.rpartition("-")
    return name.lower().replace("_", "-"), version


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What the image takes of the checkout."""
    for name in copied(GPU):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def put_base(python: Path, base: str) -> list[Path]:
    """Puts stand-ins for a base image's packages into the environment; returns them."""
    site = next(python.parent.glob("lib/python*/site-packages"))
    folders = []
    for name, version in BASES[base].items():
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "INSTALLER").write_text("pip\n")
        (folder / "RECORD").touch()
        folders.append(folder)
    return folders


def resolve_actor(python: Path, sources: Path, base: str) -> tuple[int, str]:
    folders = put_base(python, base)
    try:
        # megatron-core 0.18 asks for Python 3.12, which the base image has. The rest is resolved for this Python.
        lenient = {"PIP_IGNORE_REQUIRES_PYTHON": "1"}
        return run("install-project.sh", sources / "no-engine", python, lenient, sources)
    finally:
        for folder in folders:
            shutil.rmtree(folder)


@slow
def test_the_actors_environment_resolves_over_the_base_image(python: Path, sources: Path) -> None:
    base = arguments(DOCKERFILE.read_text())["BASE"]
    status, output = resolve_actor(python, sources, base)
    assert status == 0, output[-3000:]
    (packages,) = would_install(output)
    assert packages["megatron-core"] == GIVEN["MEGATRON_CORE"] and "megatron-rl" in packages
    kept = {name.lower() for name in BASES[base]} - {"pyyaml"}
    assert not kept & packages.keys(), "packages that NVIDIA built stay"
    assert not [name for name in packages if name.startswith("nvidia-")], "no other CUDA comes beside the base image's"


@slow
def test_a_base_image_outside_the_window_is_named(python: Path, sources: Path) -> None:
    status, output = resolve_actor(python, sources, "nvcr.io/nvidia/pytorch:25.06-py3")
    assert status == 1 and would_install(output) == []
    assert "BASE: torch 2.8.0a0" in output and "Known to suit: nvcr.io/nvidia/pytorch:25.09-py3" in output


@slow
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engines_environment_resolves_with_the_common_nccl(python: Path, tmp_path: Path, engine: str) -> None:
    """Wheels are those for Python 3.12 of the base image, whatever runs this test."""
    target = {"PIP_PYTHON_VERSION": "3.12", "PIP_ONLY_BINARY": ":all:", "PIP_TARGET": str(tmp_path / "target")}
    status, output = run("install-engine.sh", tmp_path / "engine", python, {"ENGINE": engine, **target})
    assert status == 0, output[-3000:]
    packages, common = would_install(output)
    kind = engine_kind(engine)
    assert isinstance(kind, ServerKind) and SpecifierSet(kind.releases).contains(packages[engine])
    assert common == {"nvidia-nccl-cu13": GIVEN["NCCL"]}
    assert Version(packages["nvidia-nccl-cu13"]) <= Version(GIVEN["NCCL"]), "an older NCCL may lack functions"
    assert int(packages["cuda-toolkit"].split(".")[0]) == max(DRIVERS), "doctor asks for the driver of this CUDA"


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    status, output = run("install-engine.sh", tmp_path / "engine", tmp_path, {"ENGINE": "trt"})
    assert status == 1 and output.strip() == "ENGINE=trt: expected sglang, vllm or none"
    assert run("install-engine.sh", tmp_path / "engine", tmp_path, {"ENGINE": "none"}) == (0, "")
