"""Checks of the text of Dockerfile, scripts and compose file. `make image-test` builds and starts the CPU target.

The GPU target was never built. `test_resolution.py` runs its scripts with pip only pretending.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_rl.rollout.engines.kind import server_kinds
from megatron_rl.utils.versions import requirements
from tests.tiers import slow
from tests.unit.docker.dockerfile import DOCKERFILE, ROOT, arguments, copied, environment, stage

COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))


def lint(tool: str, *files: Path) -> None:
    done = subprocess.run([Path(sys.executable).with_name(tool), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_linters_find_nothing() -> None:
    lint("hadolint", DOCKERFILE)
    lint("shellcheck", *SCRIPTS)
    assert all(script.stat().st_mode & 0o100 for script in SCRIPTS) and len(SCRIPTS) == 2


def test_bases_are_pinned_and_come_before_the_first_stage() -> None:
    text = DOCKERFILE.read_text()
    bases = arguments(text.split("\nFROM ")[0])
    assert bases.keys() == {"BASE", "CPU_BASE"}
    assert all(":" in image and not image.endswith(":latest") for image in bases.values())
    assert re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE) == [("${CPU_BASE}", "cpu"), ("${BASE}", "cuda")]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_each_image_runs_as_a_user_who_owns_the_folder_of_the_runs(name: str) -> None:
    text = stage(name)
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert 'CMD ["megatron-rl", "doctor", "--quick"]' in text
    (folder,) = {
        volume.split(":")[1] for service in COMPOSE.values() for volume in service["volumes"] if "runs" in volume
    }
    assert f"install -d -o trainer -g trainer {folder}" in text, "Docker makes a missing folder for root"


def test_the_gpu_image_has_the_environment_of_the_ranks() -> None:
    variables = environment(stage("cuda"))
    assert variables["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0", "NVIDIA's images set 1: fp32 products become TF32"
    assert variables["PIP_CONSTRAINT"] == "", "NVIDIA's images set a list of their own versions"
    assert variables["LD_LIBRARY_PATH"].startswith("/opt/nccl:"), "the actor uses the engine's NCCL"
    assert "docker/versions.py image /opt/engine" in stage("cuda"), "the build fails if NCCL differs"


def test_the_gpu_image_keeps_nvidias_entry_point() -> None:
    """It makes the image's CUDA libraries work with an older driver; the build checks that the script is there."""
    text = stage("cuda")
    assert 'ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "megatron-rl"]' in text
    assert "test -x /opt/nvidia/nvidia_entrypoint.sh" in text


def test_versions_of_the_image_are_supported_ones() -> None:
    given = arguments(stage("cuda"))
    for kind in server_kinds():
        assert kind.releases.startswith(f">={given[kind.name.upper()].rsplit('.', 1)[0]}")
    (megatron,) = (item for item in requirements() if item.name == "megatron-core")
    assert megatron.specifier.contains(given["MEGATRON_CORE"])


def test_everything_that_the_images_copy_is_sent_to_the_build() -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {*copied(stage("cpu")), *copied(stage("cuda"))} <= sent
    assert all((ROOT / name).exists() for name in sent)


def test_compose_names_targets_that_exist() -> None:
    assert {service["build"]["target"] for service in COMPOSE.values()} == {"cpu", "cuda"}
    train = COMPOSE["train"]
    assert train["ipc"] == "host" and train["ulimits"]["memlock"] == -1 and train["ulimits"]["nofile"] >= 65536
    assert not any("=" in name for name in train["environment"]), "values belong to the machine"


def versions(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "docker/versions.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_base_without_transformer_engine_is_named() -> None:
    done = versions("base")
    assert done.returncode == 1
    assert done.stderr.startswith("BASE: transformer-engine is not installed") and "Known to suit" in done.stderr
    assert versions().returncode == 1


@slow
def test_an_image_lists_its_environments(tmp_path: Path) -> None:
    done = versions("image", Path(sys.prefix))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("actor: torch ") and "\nengine: torch " in done.stdout
    assert "megatron-core 0." in done.stdout and " GB in " in done.stdout
    assert "engine:" not in versions("image", tmp_path / "none").stdout
