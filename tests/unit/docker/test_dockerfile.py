"""Checks of the text of Dockerfile and compose file. `make image-test` builds and starts the CPU target."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "docker/Dockerfile"


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bases_are_pinned_and_come_before_the_first_stage() -> None:
    text = DOCKERFILE.read_text()
    bases = re.findall(r"^ARG (\w*BASE)=(\S+)$", text.split("\nFROM ")[0], re.MULTILINE)
    assert {name for name, _ in bases} == {"BASE", "CPU_BASE"}
    assert all(":" in image and not image.endswith(":latest") for _, image in bases)
    assert re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE) == [("${CPU_BASE}", "cpu"), ("${BASE}", "cuda")]


def test_each_image_runs_as_a_user_with_a_health_check() -> None:
    for stage in DOCKERFILE.read_text().split("\nFROM ")[1:]:
        assert re.search(r"^USER 10001$", stage, re.MULTILINE)
        assert 'CMD ["megatron-rl", "doctor", "--quick"]' in stage


def test_compose_names_targets_that_exist() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    assert {service["build"]["target"] for service in services.values()} == {"cpu", "cuda"}
    assert services["train"]["ipc"] == "host" and services["train"]["ulimits"]["memlock"] == -1
