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
from megatron_rl.rollout.engines.kind import EngineKind
KIND = EngineKind(name="own", engine="no_such_package.engine:Engine")

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
    shutil.copytree(tmp_path / "bare", tmp_path / "pickled")
    (tmp_path / "pickled/pytorch_model.bin").touch()
    shutil.copytree(task / "model", tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, row in BAD_ROWS.items():
        rows = [good, json.dumps({"prompt": "<bos> 1 2 3 > 6 :", "label": "1 2 3 > 6"} | row)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


BAD_ROWS: dict[str, dict[str, object]] = {
    "list": {"label": ["1 2 3 > 6"]},
    "nothing": {"label": ""},
    "switch": {"label": True},
    "null": {"label": None},
    "picture": {"images": [{"bytes": "...", "path": None}]},
    "part": {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]},
}
"""Name of a file -> what its second row has in place of a good one."""

FOUND_BY_A_DRY_RUN = [
    ("model.path=pickled", ["pytorch_model.bin", "save_pretrained"]),
    ("model.path=cut", ["cut/model.safetensors", "cut off", "Copy the model again"]),
    ("rollout.max_response_tokens=60", ["train.jsonl, line 1", "64 positions", "model.max_positions: 67"]),
    ("evaluation.max_response_tokens=60", ["held_out.jsonl, line 1", "evaluation.max_response_tokens", "64 positions"]),
    ("rollout.stop_token_ids=[95]", ["rollout.stop_token_ids: 95", "has 95"]),
    ("reward.name=refused_rewards:not_there", ["refused_rewards", "not_there"]),
    ("reward.name=refused_rewards:misspelt", ["refused_rewards:misspelt", "trial call", "NameError"]),
    ("rollout.engine=refused_rewards:KIND", ["rollout.engine", "no_such_package"]),
    *(
        (f"data.train={name}.jsonl", [f"{name}.jsonl, line 2", "label"])
        for name in ("list", "nothing", "switch", "null")
    ),
    *((f"data.train={name}.jsonl", [f"{name}.jsonl, line 2", "picture"]) for name in ("picture", "part")),
]


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
        ("reward.name=refused_rewards:misspelt", ["refused_rewards:misspelt", "trial call", "NameError", "line 8"]),
        ("reward.name=refused_rewards:of_trl", ["refused_rewards:of_trl", "TRL", "def score(sample):"]),
        ("evaluation.probes.p_wait_after_no.token=hello", ["evaluation.probes.p_wait_after_no.token"]),
        ("resume=elsewhere", ["elsewhere"]),
        ("run.folder=bare", ["bare", "holds no run"]),
        ("actor.device=cuda", ["actor.device: cuda", "torch finds 0"]),
        ("rollout.engine=no_such_module:KIND", ["rollout.engine", "no_such_module"]),
        *FOUND_BY_A_DRY_RUN,
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


@pytest.mark.parametrize(("override", "words"), FOUND_BY_A_DRY_RUN)
def test_a_dry_run_finds_the_mistake_too(
    workplace: Path, capsys: pytest.CaptureFixture[str], override: str, words: list[str]
) -> None:
    before = sorted(workplace.rglob("*"))
    assert main(["train", str(QUICKSTART), "--dry-run", override]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "nothing wrong found" not in error
    assert sorted(workplace.rglob("*")) == before


def test_a_dry_run_ends_with_what_was_checked_and_what_was_not(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(QUICKSTART), "--dry-run"]) == 0
    *_, checked, memory, gpus, end = capsys.readouterr().err.splitlines()
    assert checked.startswith("# checked: keys and values, files, ")
    assert all(word in checked for word in ("weights", "prompts and labels", "reward", "engine"))
    assert memory.startswith("# not checked: memory: ") and gpus.startswith("# not checked: GPUs")
    assert end.endswith("nothing wrong found")


def test_a_dry_run_says_why_it_could_not_check(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(workplace / "runs")
    assert main(["train", str(QUICKSTART), "--dry-run", "actor.device=cuda", "cluster.slurm.container=pyxis"]) == 0
    lines = capsys.readouterr().err.splitlines()
    reasons = {line.split(": ")[1]: line for line in lines if line.startswith("# not checked: ")}
    assert all("the run itself writes" in reasons[what] for what in ("weights", "prompts and labels"))
    assert all("in a container" in reasons[what] for what in ("engine", "reward"))
    assert main(["train", str(QUICKSTART), "--dry-run", "actor.device=cuda"]) == 0
    assert "# not checked: engine: this machine has no GPU" in capsys.readouterr().err


def test_several_mistakes_are_reported_together(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.train=switch.jsonl", "model.path=cut", "reward.name=refused_rewards:not_there"]
    assert main(["train", str(QUICKSTART), "--dry-run", *overrides]) == 2
    error = capsys.readouterr().err
    assert "cut/model.safetensors" in error and "not_there" in error


def test_a_longer_limit_of_positions_can_be_set(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["rollout.max_response_tokens=60", "model.max_positions=67"]
    assert main(["train", str(QUICKSTART), "--dry-run", *overrides]) == 0
