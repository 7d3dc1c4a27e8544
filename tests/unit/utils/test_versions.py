"""The windows of supported versions, and what is said about a version outside."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_rl.utils import versions
from megatron_rl.utils.versions import TRANSFORMER_ENGINE, oldest_driver, problem, problems

ROOT = Path(__file__).parents[3]
TORCH = Requirement("torch>=2.8")
MEGATRON = Requirement("megatron-core>=0.16.1,<0.20")


@pytest.mark.parametrize(
    ("requirement", "found", "misfit"),
    [
        (TORCH, "2.8.0a0+5228986c39.nv25.6", "too old"),  # NVIDIA's 25.06, which PEP 440 orders below 2.8
        (TORCH, "2.13.0a0+8145d630e8.nv26.6.1", None),
        (TORCH, None, "absent"),
        (MEGATRON, "0.16.0", "too old"),
        (MEGATRON, "0.19.2", None),
        (MEGATRON, "0.20.1", "too new"),
        (TRANSFORMER_ENGINE, "1.13.0", "too old"),
        (TRANSFORMER_ENGINE, "2.16.0+4220403e", None),
    ],
)
def test_versions_are_judged_by_their_window(requirement: Requirement, found: str | None, misfit: str | None) -> None:
    judged = problem(requirement, found)
    assert (judged.misfit if judged else None) == misfit
    if judged:
        assert requirement.name in str(judged) and requirement.name in judged.remedy


def test_transformer_engine_is_judged_on_gpus_only_and_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "1.0" if name == TRANSFORMER_ENGINE.name else real(name))
    assert [found.requirement.name for found in problems("cuda")] == [TRANSFORMER_ENGINE.name]
    assert problems("cpu") == []
    monkeypatch.setattr(versions, "installed", lambda name: None if name == TRANSFORMER_ENGINE.name else real(name))
    assert problems("cuda") == []


def test_a_driver_follows_from_the_version_of_cuda() -> None:
    assert [oldest_driver(cuda) for cuda in ("12.8", "13.0", "13.3")] == [525, 580, 580]
    assert oldest_driver("14.0") == 580, "an unknown version needs at least the newest driver that is known"


def test_bounds_of_the_package_allow_what_is_promised() -> None:
    """Ray has token authentication since 2.52; torch and megatron-core are those of the image and the rehearsal."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {item.name: item.specifier for item in versions.applicable(declared)}
    assert bounds["ray"] == SpecifierSet(">=2.52")
    assert all(bounds["megatron-core"].contains(release) for release in ("0.16.1", "0.18.2", "0.19.2"))
    assert bounds["torch"].contains("2.13.0a0+8145d630e8.nv26.6.1", prereleases=True)
