"""Mistakes of a user are reported at once, with key and cause, and leave no files behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.data.countdown import write_task

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/countdown.yaml"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input") / "countdown-task"
    write_task(folder)
    return folder


REWARDS = """
def of_trl(completions, **kwargs): return [0.0]

def misspelt(sample):
    return smaple.text
"""


@pytest.fixture
def workplace(
    task: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the task where the quickstart expects it, and a few broken files."""
    monkeypatch.chdir(tmp_path)
    modules = tmp_path_factory.mktemp("modules")
    (modules / "refused_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(modules)
    shutil.copytree(task, tmp_path / "runs/countdown-task")
    good = json.dumps({"prompt": "<bos> 1 2 3 > 6 :", "label": "1 2 3 > 6"})
    (tmp_path / "broken.jsonl").write_text(good + "\n{oops\n")
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(task / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor.tensor_paralel=2", ["actor.tensor_paralel", "actor.tensor_parallel"]),
        ("train.steps=many", ["train.steps", "whole number"]),
        ("actor.tensor_parallel=3", ["actor.tensor_parallel is 3", "attention heads"]),
        ("actor.pad_vocabulary=false", ["vocabulary of 95"]),
        ("actor.pipeline_parallel=4", ["actor.pipeline_parallel is 4", "only 3 layers"]),
        ("data.train=missing.jsonl", ["missing.jsonl", "no such file"]),
        ("data.train=broken.jsonl", ["broken.jsonl", "line 2"]),
        ("data.train=empty.jsonl", ["empty.jsonl", "empty"]),
        ("data.max_prompt_tokens=3", ["longer than data.max_prompt_tokens"]),
        ("model.path=nowhere", ["nowhere", "no such folder"]),
        ("model.path=bare", ["bare", "no weights"]),
        ("reward.name=countdwn", ["countdwn", "countdown"]),
        ("reward.name=refused_rewards:misspelt", ["refused_rewards:misspelt", "trial call", "NameError", "line 5"]),
        ("reward.name=refused_rewards:of_trl", ["refused_rewards:of_trl", "TRL", "def score(sample):"]),
        ("evaluation.probes.p_wait_after_no.token=hello", ["evaluation.probes.p_wait_after_no.token"]),
        ("resume=elsewhere", ["elsewhere"]),
        ("run.folder=bare", ["bare", "holds no run"]),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(
    workplace: Path, capsys: pytest.CaptureFixture[str], override: str, words: list[str]
) -> None:
    before = sorted(workplace.rglob("*"))
    assert main(["train", str(QUICKSTART), "run.name=refused", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert sorted(workplace.rglob("*")) == before
