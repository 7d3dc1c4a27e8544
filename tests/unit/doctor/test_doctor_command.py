"""The command `megatron-rl doctor`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.cli import main
from megatron_rl.cluster.probe import collectives
from megatron_rl.cluster.runtime import ray_runtime
from megatron_rl.config import load_config
from megatron_rl.doctor.engines import check_engines
from megatron_rl.doctor.findings import Finding, show
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.placement import place
from tests.hf_models import write_hf_model
from tests.tiers import slow

CONFIG = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 16, samples_per_prompt: 8, max_response_tokens: 8}
reward: {name: math}
train: {steps: 10}
"""


def test_a_failure_is_shown_with_its_remedy() -> None:
    console = Console(record=True, width=100)
    assert not show([Finding("a", "ok", "fine", "unneeded"), Finding("b", "failure", "broken", "repair it")], console)
    text = console.export_text()
    assert "repair it" in text and "unneeded" not in text and "1 failed" in text
    assert show([Finding("a", "warning", "so so", "perhaps")], console)


def test_quick_loads_nothing_heavy() -> None:
    script = (
        "import sys; from megatron_rl.cli import main; main(['doctor', '--quick']);"
        "sys.exit(str({'torch', 'ray', 'megatron', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "packages" in done.stdout


@pytest.mark.e2e
def test_doctor_checks_a_cluster_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)
    write_hf_model(Path("model"), "qwen3_moe")
    layout = ["actor.device=cpu", "actor.tensor_parallel=2", "actor.data_parallel=2", "actor.expert_parallel=2"]
    assert main(["doctor", "mine.yaml", *layout]) == 1
    assert "layout failure actor.tensor_parallel is 2 and" in " ".join(capsys.readouterr().out.split())
    assert main(["doctor", "mine.yaml", *layout, "actor.sequence_parallel=true"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in (
        "same on all nodes",
        "all ranks ok 1 x 4 ranks",
        "NCCL or gloo ok gloo",
        "tensor parallel ok 2 x 2",
        "data parallel ok 2 x 2",
        "expert parallel ok 2 x 2",
        "engines ok 1 x transformers started",
        "for 3 checkpoints of",
    ):
        assert words in output
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "model"}


@slow
@pytest.mark.e2e
def test_every_process_group_is_checked_and_engine_failures_give_reasons(tmp_path: Path) -> None:
    """Context parallelism trains on CUDA only, but its process groups exist on the CPU too."""
    (tmp_path / "mine.yaml").write_text(CONFIG.replace("path: model", f"path: {tmp_path / 'model'}"))
    config = load_config(tmp_path / "mine.yaml", ["actor.device=cpu"])
    absent = load_config(tmp_path / "mine.yaml", ["actor.device=cpu", "rollout.engine=sglang"])
    weights = write_hf_model(tmp_path / "model") / "model.safetensors"
    layout = Layout(pipeline=2, context=2)
    with ray_runtime(place(layout, 1, config.cluster, engine_gpus=0, on_gpu=False)) as nodes:
        result = collectives(nodes, "cpu", layout, tmp_path)
        not_installed = check_engines(absent, nodes, tmp_path)
        weights.write_bytes(weights.read_bytes()[:-100])
        damaged = check_engines(config, nodes, tmp_path)
        weights.unlink()
        not_there = check_engines(config, nodes, tmp_path)
    assert result.libraries == ["gloo"] * 4
    members = {name: {groups[name][0] for groups in result.sums} for name in result.sums[0]}
    assert members == {
        "all ranks": {(0, 1, 2, 3)},
        "pipeline parallel": {(0, 2), (1, 3)},
        "context parallel": {(0, 1), (2, 3)},
    }
    assert not_installed.state == "failure" and "rollout.server.python" in not_installed.remedy
    assert "engine 0 did not start" in not_installed.found and "No module named" in not_installed.found
    assert damaged.state == "failure" and "model.safetensors" in damaged.found
    assert not_there.state == "skipped" and "has no weights yet" in not_there.found


@pytest.mark.e2e
def test_a_missing_cluster_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)
    assert main(["doctor", "mine.yaml", "actor.device=cpu", "actor.data_parallel=2", "cluster.nodes=2"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "RAY_ADDRESS names no Ray" in output and "1 failed" in output
