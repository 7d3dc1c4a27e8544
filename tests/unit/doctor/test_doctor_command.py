"""`megatron-rl doctor` as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.cli import main
from megatron_rl.doctor.finding import Finding
from megatron_rl.doctor.show import show

CONFIG = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 16, samples_per_prompt: 8, max_response_tokens: 8}
reward: {name: math}
train: {steps: 10}
"""


def test_a_failure_is_the_exit_status_and_comes_with_what_to_do() -> None:
    console = Console(record=True, width=100)
    assert not show([Finding("a", "ok", "fine", "unsaid"), Finding("b", "failure", "broken", "mend it")], console)
    text = console.export_text()
    assert "mend it" in text and "unsaid" not in text and "1 failed" in text
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
def test_a_cluster_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)
    layout = ["actor.device=cpu", "actor.tensor_parallel=2", "actor.pipeline_parallel=2"]
    assert main(["doctor", "mine.yaml", *layout]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "same on all nodes",
        "all ranks ok 1 x 4 ranks",
        "tensor parallel ok 2 x 2",
        "pipeline parallel ok 2 x 2",
    ):
        assert words in said
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml"}


@pytest.mark.e2e
def test_a_cluster_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)
    assert main(["doctor", "mine.yaml", "actor.device=cpu", "actor.data_parallel=2", "cluster.nodes=2"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "RAY_ADDRESS names no Ray" in said and "1 failed" in said
