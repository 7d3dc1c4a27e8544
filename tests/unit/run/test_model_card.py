"""The model card of a run, and the upload with a stub in place of the Hub."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled

from megatron_rl import push_to_hub
from megatron_rl.cli import main
from megatron_rl.config import expand, load_config
from megatron_rl.errors import UserError
from megatron_rl.run.model_card import hub_name, model_card

CONFIG = """\
run: {name: mine}
model: {path: /cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123456789ab}
data: {train: /data/secret/mine.parquet}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: math}
algorithm: {name: lp_reg, preset: paper, lp_reg: {rho: 0.02}}
train: {steps: 20}
"""
EVALUATIONS = [{"step": 0, "time": 1.0, "eval/aime/avg@8": 0.25}, {"step": 20, "time": 2.0, "eval/aime/avg@8": 0.5}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "hf").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (folder / "config.yaml").write_text(expand(load_config(tmp_path / "mine.yaml")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EVALUATIONS))
    (folder / "hf/config.json").write_text("{}")
    (folder / "hf/README.md").write_text("The card of the base model.")
    return folder


def test_the_card_says_what_was_trained_how_and_with_which_result(run: Path) -> None:
    _, metadata, text = model_card(run).split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-0.6B",
        "tags": ["reinforcement-learning", "rlvr", "megatron-rl", "lp-reg"],
    }
    assert "# mine\n" in text and "20 steps with the method `lp_reg` on `mine.parquet`" in text
    assert "| aime | accuracy (avg@8) | 0.250 | 0.500 | +0.250 |" in text
    assert "algorithm.lp_reg.rho: 0.02\n" in text and "train.steps: 20\n" in text
    assert "secret" not in text and "actor.dtype" not in text


def test_the_upload_carries_the_card(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(((options["folder_path"] / "README.md").read_text(), options))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push_to_hub(str(run), "me/mine", private=True) == "https://hub/commit"
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[1][0] == model_card(run) and calls[1][1]["repo_id"] == "me/mine"
    assert calls[1][1]["folder_path"] == run / "hf"


def test_a_hub_that_is_out_of_reach_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(UserError, match=r"me/mine: the Hub did not take the upload: offline\n.*hf auth login"):
        push_to_hub(run, "me/mine")


def test_a_machine_without_a_network_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself fails to connect: nothing listens at this address."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}", token=False)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        with pytest.raises(UserError, match=r"(?s)me/mine: the Hub did not take the upload: .*reach the Hub"):
            push_to_hub(run, "me/mine")


@pytest.mark.parametrize("text", ["", "[]", "run: 3", "{run: {name: mine}}"])
def test_a_configuration_without_what_the_card_tells_is_an_error(run: Path, text: str) -> None:
    (run / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config.yaml: not the complete configuration of a run"):
        push_to_hub(run, "me/mine")


def test_the_command_writes_the_card_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "--output", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == model_card(run)
    assert (run / "hf/README.md").read_text() == "The card of the base model."
    assert main(["push", str(run)]) == 2
    assert "give OWNER/NAME" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "words"), [("hf/config.json", "no export in"), ("config.yaml", "holds no run")])
def test_a_run_without_export_or_configuration_is_an_error(run: Path, missing: str, words: str) -> None:
    (run / missing).unlink()
    with pytest.raises(UserError, match=words):
        push_to_hub(run, "me/mine")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/c/models--Qwen--Qwen3-0.6B/snapshots/abc", "Qwen/Qwen3-0.6B"),
        ("/a/megatron-rl/data/me--maths/me--maths-train-0123.parquet", "me/maths"),
        ("models/Qwen3-14B-Base", "Qwen3-14B-Base"),
    ],
)
def test_names_of_local_copies(path: str, name: str) -> None:
    assert hub_name(path) == name
