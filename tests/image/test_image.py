"""Builds both targets without a Docker engine, with buildah, and starts the CPU target.

The CPU target gets a base made by debootstrap. The GPU target gets a stand-in for NVIDIA's image: the CPU image with
some names of what NVIDIA's has. The steps of its build are run, but nothing of NVIDIA's image is, and no engine is
installed.
Layers are cached in ~/.cache/megatron-rl/image, so a second build takes seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.image, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-rl/image"
TASK = "/opt/megatron-rl/examples/quickstart/countdown.yaml"
SHORT = (
    "train.steps=1",
    "warm_start.phases.0.steps=5",
    "warm_start.phases.1.steps=2",
    "evaluation.suites=null",
    "evaluation.probes=null",
)


def missing() -> str | None:
    """Returns why no image can be built here, or None if it can."""
    absent = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if absent:
        packages = "apt-get install -y --no-install-recommends buildah debootstrap"
        return f"{', '.join(absent)} not installed; on Debian: {packages}"
    return None if os.geteuid() == 0 else "making a base image requires root"


def buildah(*arguments: str, seconds: int = 1200) -> str:
    store = ["--root", str(CACHE / "store"), "--runroot", str(CACHE / "run"), "--storage-driver", "overlay"]
    command = ["buildah", *store, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def machine_mounts() -> list[str]:
    """Mounts for the build: this machine's certificates, its pip settings, and folders that these settings name."""
    files = [Path("/etc/ssl/certs"), Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf"]
    words = " ".join(path.read_text() for path in files[1:] if path.is_file()).replace("file://", "").split()
    folders = {Path(*Path(word).parts[:3]) for word in words if word.startswith("/opt/")}
    there = [path for path in [*files, *sorted(folders)] if path.exists()]
    return [argument for path in there for argument in ("--volume", f"{path}:{path}:ro")]


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """A container of the CPU image, built from this checkout."""
    if reason := missing():
        pytest.skip(f"THE IMAGE WAS NOT TESTED: {reason}")
    base = CACHE / "base"
    if "localhost/base" not in buildah("images"):
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(base, ignore_errors=True)
        bootstrap = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(base)]
        subprocess.run(bootstrap, check=True, capture_output=True, timeout=600)
        scratch = buildah("from", "scratch").strip()
        buildah("add", scratch, str(base), "/")
        buildah("commit", scratch, "base")
        buildah("rm", scratch)
        shutil.rmtree(base)
    arguments = ["--build-arg", "CPU_BASE=localhost/base", "--build-arg", "TORCH_INDEX="]
    options = ["--format", "docker", "--isolation", "chroot", "--layers", "--target", "cpu", "--tag", "cpu"]
    buildah("bud", *options, *arguments, *machine_mounts(), "--file", "docker/Dockerfile", ".")
    name = buildah("from", "cpu").strip()
    yield name
    buildah("rm", name)


def inside(container: str, *command: str, options: tuple[str, ...] = ()) -> str:
    """Runs a command in the container. Its output goes through a file: in a chroot buildah may lose a short one."""
    output = f"/tmp/output-{secrets.token_hex(4)}"
    words = ["sh", "-c", f'"$@" >{output}', "sh", *command]
    buildah("run", "--isolation", "chroot", *options, container, "--", *words)
    return Path(buildah("mount", container).strip() + output).read_text()


def test_the_images_configuration(container: str) -> None:
    config = json.loads(buildah("inspect", "--type", "image", "cpu"))["Docker"]["config"]
    assert config["User"] == "10001"
    assert config["Entrypoint"] == ["megatron-rl"] and config["Cmd"] == ["train", TASK]
    assert config["Healthcheck"]["Test"] == ["CMD", "megatron-rl", "doctor", "--quick"]


def test_the_image_is_healthy_and_does_not_run_as_root(container: str) -> None:
    assert inside(container, "id", "-u").strip() == "10001"
    assert "nothing found that would stop a run" in inside(container, "megatron-rl", "doctor", "--quick")


STAND_IN = """
set -e
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
te=$site/transformer_engine-2.16.0+4220403e.dist-info
mkdir "$te"
printf 'Metadata-Version: 2.1\\nName: transformer-engine\\nVersion: 2.16.0+4220403e\\n' >"$te/METADATA"
install -D -m 755 /dev/stdin /opt/nvidia/nvidia_entrypoint.sh <<'END'
#!/bin/sh
exec "$@"
END
pip uninstall --yes --quiet megatron-rl
userdel --remove trainer
rm -rf /opt/megatron-rl
"""


@pytest.fixture(scope="module")
def gpu_container(container: str) -> Iterator[str]:
    """A container of the GPU image without an engine, built over the stand-in."""
    base = buildah("from", "cpu").strip()
    buildah("run", "--user", "root", "--isolation", "chroot", base, "--", "bash", "-c", STAND_IN)
    buildah("config", "--user", "root", "--entrypoint", "[]", "--env", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1", base)
    buildah("commit", base, "stand-in")
    buildah("rm", base)
    # megatron-core 0.18 needs the Python 3.12 of NVIDIA's image.
    arguments = ["BASE=localhost/stand-in", "ENGINE=none", "MEGATRON_CORE=0.16.1"]
    options = ["--format", "docker", "--isolation", "chroot", "--target", "cuda", "--tag", "gpu"]
    given = [word for argument in arguments for word in ("--build-arg", argument)]
    buildah("bud", *options, *given, *machine_mounts(), "--file", "docker/Dockerfile", ".")
    name = buildah("from", "gpu").strip()
    yield name
    buildah("rm", name)


def test_the_gpu_target_builds_over_a_stand_in(gpu_container: str) -> None:
    config = json.loads(buildah("inspect", "--type", "image", "gpu"))["Docker"]["config"]
    assert config["User"] == "10001" and config["Entrypoint"][-1] == "megatron-rl"
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"
    assert environment["LD_LIBRARY_PATH"].split(":")[0] == "/opt/nccl"
    listed = inside(gpu_container, "cat", "/opt/megatron-rl/VERSIONS")
    assert "transformer-engine 2.16.0+4220403e" in listed and "megatron-core 0.16.1" in listed
    assert inside(gpu_container, "stat", "-c", "%U", "/home/trainer/runs").strip() == "trainer"
    assert "usage" in inside(gpu_container, *config["Entrypoint"], "--help")


def test_a_process_without_a_home_gets_one(container: str) -> None:
    program = "from megatron_rl.utils.home import provide_home; print(provide_home())"
    found = inside(container, "python3", "-c", program, options=("--user", "54321", "--env", "HOME=/"))
    assert found.strip() == "/tmp/megatron-rl-home-54321"


def test_the_quickstart_starts(container: str) -> None:
    output = inside(container, "megatron-rl", "train", TASK, "run.name=image", *SHORT)
    assert "step=1/1" in output and "largest logit difference" in output
