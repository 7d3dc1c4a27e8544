"""A run on GPUs is refused before anything starts if its software does not go together. GPUs are pretended."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.doctor.environments import check_environments
from megatron_rl.errors import UserError
from megatron_rl.run import stack
from megatron_rl.run.requirements import check_engine
from megatron_rl.utils import versions
from tests.unit.doctor.test_doctor_command import CONFIG
from tests.unit.utils.test_environments import ACTOR, ENGINE, interpreter

SAME = replace(ACTOR, nccl=ENGINE.nccl)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of SGLang servers whose interpreter is a stand-in; the actor's is a stand-in too."""
    (tmp_path / "mine.yaml").write_text(CONFIG)
    monkeypatch.setattr(sys, "executable", str(interpreter(tmp_path / "actor", ACTOR)))
    engine = interpreter(tmp_path / "engine", ENGINE)
    overrides = ["actor.device=cuda", "rollout.engine=sglang", f"rollout.server.python={engine}"]
    return load_config(tmp_path / "mine.yaml", overrides)


def changed(config: Config, tmp_path: Path, *overrides: str) -> Config:
    given = ["actor.device=cuda", "rollout.engine=sglang", f"rollout.server.python={config.rollout.server.python}"]
    return load_config(tmp_path / "mine.yaml", [*given, *overrides])


def test_a_broadcast_between_two_versions_of_nccl_is_refused(config: Config) -> None:
    with pytest.raises(UserError) as caught:
        stack.check_stack(config)
    assert "2.30.4 for the actor" in str(caught.value) and "nvidia-nccl-cu13==2.30.7" in str(caught.value)
    findings = {finding.check: finding for finding in check_environments(config)}
    assert findings["NCCL of both sides"].state == "failure"
    assert "NCCL 2.30.7" in findings["environment of the engine"].found


def test_equal_versions_and_other_transports_are_accepted(config: Config, tmp_path: Path) -> None:
    stack.check_stack(changed(config, tmp_path, "weight_sync.transport=disk"))
    interpreter(Path(sys.executable), SAME)
    stack.check_stack(config)
    assert {finding.state for finding in check_environments(config)} == {"ok"}


def test_an_old_driver_and_a_broken_environment_are_named(config: Config, tmp_path: Path) -> None:
    interpreter(Path(sys.executable), replace(SAME, driver="12.4"))
    with pytest.raises(UserError, match="driver 580 or newer"):
        stack.check_stack(config)
    absent = changed(config, tmp_path, "rollout.server.python=/none/python")
    (finding,) = check_environments(absent)
    assert finding.state == "failure" and "/none/python cannot be started" in finding.found


def test_nothing_is_asked_on_a_cpu_or_of_servers_that_run_already(config: Config, tmp_path: Path) -> None:
    on_cpu = config.model_copy(update={"actor": config.actor.model_copy(update={"device": "cpu"})})
    stack.check_stack(on_cpu)
    assert stack.environments_of(on_cpu) == {}
    attached = changed(config, tmp_path, "rollout.server.urls=[http://127.0.0.1:1]")
    assert set(stack.environments_of(attached)) == {stack.ACTOR}


def test_an_unsupported_version_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter(Path(sys.executable), SAME)
    real = versions.installed
    for package, version in (("megatron-core", "0.20.1"), ("transformer-engine", "2.3.0"), ("torch", "2.8.0a0+x")):
        monkeypatch.setattr(versions, "installed", lambda name, p=package, v=version: v if name == p else real(name))
        with pytest.raises(UserError, match=rf"{package} {re.escape(version)} is installed, but .* pip install"):
            stack.check_stack(config)


def test_an_engine_that_is_not_installed_is_named_with_the_command(config: Config, tmp_path: Path) -> None:
    without = tmp_path / "python-without-sglang"
    without.write_text("#!/bin/sh\nexit 1\n")
    without.chmod(0o755)
    for device in ("cpu", "cuda"):
        given = changed(config, tmp_path, f"rollout.server.python={without}", f"actor.device={device}")
        with pytest.raises(UserError, match=r"rollout\.engine: sglang is not installed for .*`make engines`"):
            check_engine(given)
    check_engine(changed(config, tmp_path, f"rollout.server.python={without}", "rollout.server.urls=[http://x:1]"))
    with pytest.raises(UserError, match=r"rollout\.server\.python: /none/python cannot be started"):
        check_engine(changed(config, tmp_path, "rollout.server.python=/none/python"))
