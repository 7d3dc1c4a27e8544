"""Settings of NCCL that both sides of a weight update share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.rollout.engines.interface import EngineLaunch
from megatron_rl.rollout.engines.kind import ServerKind, server_kinds
from megatron_rl.utils.import_path import import_object
from megatron_rl.utils.nccl import AGREED, agreed_environment


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AGREED:
        monkeypatch.delenv(name, raising=False)


def environment(kind: ServerKind, device: str, folder: Path) -> dict[str, str]:
    launch = EngineLaunch(kind, folder, device, "bfloat16", 64)
    command: Any = import_object(kind.command, "rollout.engine")
    found: dict[str, str] = command(launch, 1, "key", folder)[1]
    return found


@pytest.mark.parametrize("kind", server_kinds(), ids=lambda kind: kind.name)
def test_servers_on_gpus_get_what_the_actor_gets(kind: ServerKind, tmp_path: Path) -> None:
    assert agreed_environment().items() <= environment(kind, "cuda", tmp_path).items()
    assert not AGREED.keys() & environment(kind, "cpu", tmp_path).keys()


def test_a_value_of_the_user_goes_to_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    assert agreed_environment() == {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
