"""What a user can get wrong is said at once, in words, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e_cpu.conftest import CommandLine

pytestmark = pytest.mark.e2e


@pytest.fixture
def broken_lines(command_line: CommandLine) -> Path:
    path = command_line.folder / "broken.jsonl"
    path.write_text(json.dumps({"prompt": "<bos> 1 2 3 > 6 :", "label": "1 2 3 > 6"}) + "\n{oops\n")
    return path


@pytest.fixture
def bare_model(command_line: CommandLine) -> Path:
    folder = command_line.folder / "bare"
    folder.mkdir(exist_ok=True)
    for path in (command_line.folder / "runs/countdown-task/model").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor.tensor_paralel=2", ["actor.tensor_paralel", "actor.tensor_parallel"]),
        ("train.steps=many", ["train.steps", "whole number"]),
        ("actor.tensor_parallel=3", ["actor.tensor_parallel is 3", "attention heads"]),
        ("actor.pad_vocabulary=false", ["vocabulary of 95"]),
        ("data.train=missing.jsonl", ["missing.jsonl", "no such file"]),
        ("data.train=broken.jsonl", ["broken.jsonl", "line 2"]),
        ("data.train=empty.jsonl", ["empty.jsonl", "empty"]),
        ("data.max_prompt_tokens=3", ["longer than data.max_prompt_tokens"]),
        ("model.path=bare", ["bare", "no weights"]),
        ("reward.name=countdwn", ["countdwn", "countdown"]),
        ("evaluation.probes.p_wait_after_no.token=hello world", ["evaluation.probes.p_wait_after_no.token"]),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    command_line: CommandLine, broken_lines: Path, bare_model: Path, override: str, words: list[str]
) -> None:
    (command_line.folder / "empty.jsonl").write_text("")
    refused = command_line.train("refused", override)
    assert refused.status == 2, refused.output
    for word in words:
        assert word in refused.output
    assert "Traceback" not in refused.output
    assert not refused.folder.exists()
