"""The examples pass a dry run, with the tiny model in the place of theirs, and a mistake in them does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf_models import write_hf_model
from tests.unit.agent.kit import tokenizer

pytest.importorskip("verifiers.v1")
pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.environments

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples/environments"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer().save_pretrained(folder)
    return write_hf_model(folder, vocab_size=len(tokenizer()), max_position_embeddings=4096)


def dry_run(model: Path, example: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    device = ("actor.device=cpu", "actor.dtype=float32", "actor.tensor_parallel=1")
    arguments = ("train", str(EXAMPLES / f"{example}.yaml"), "--dry-run", f"model.path={model}", *device, *overrides)
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl.cli", *arguments],
        cwd=model.parent,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{EXAMPLES}", "HF_HOME": str(model.parent / "hf")},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("example", "prompt"),
    [("higher_lower", "I think of a number from 1 to 100."), ("chain_sum", "<answer>")],
)
def test_an_example_passes_a_dry_run(model: Path, example: str, prompt: str) -> None:
    found = dry_run(model, example)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "nothing wrong found" in found.stderr and prompt in found.stderr
    assert "prompts and labels" in found.stderr.partition("# checked:")[2].partition("# not")[0]


@pytest.mark.parametrize(
    ("example", "override", "message"),
    [
        ("chain_sum", "data.train=reasoning-gym:chain_sums", "did you mean chain_sum"),
        ("chain_sum", "data.tasks.settings.min_terms=9", "the task refuses them"),
        ("chain_sum", "reward.name=math", "reward.name: math cannot use the label"),
        ("higher_lower", "data.train=verifiers:higher", "'higher' not found"),
        ("higher_lower", "data.tasks.settings.player.max_turns=many", "max_turns"),
        ("higher_lower", "data.tasks.settings.taskset.split=test", "problems are also in data.train"),
        ("higher_lower", "data={train: 'reasoning-gym:chain_sum', tasks: {size: 5}}", "has no column task"),
    ],
)
def test_a_mistake_is_an_error_before_anything_starts(model: Path, example: str, override: str, message: str) -> None:
    found = dry_run(model, example, override)
    assert found.returncode != 0 and message in found.stderr, found.stderr[-3000:]
    assert "Traceback" not in found.stderr
