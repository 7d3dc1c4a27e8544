"""The examples pass a dry run, with the tiny model in the place of theirs, and a mistake in them does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.utils import _cache_assets

from megatron_rl.config import load_config
from megatron_rl.data.hub import with_local_copies
from megatron_rl.errors import UserError
from megatron_rl.run.dry_run import dry_run as check
from tests.hf_models import write_hf_model
from tests.unit.agent.kit import tokenizer

pytest.importorskip("verifiers.v1")
pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.environments

EXAMPLES = Path(__file__).parents[2] / "examples/environments"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer().save_pretrained(folder)
    return write_hf_model(folder, vocab_size=len(tokenizer()), max_position_embeddings=4096)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))


def dry_run(model: Path, example: str, *overrides: str) -> None:
    """What `megatron-rl train EXAMPLE --dry-run` does."""
    device = ("actor.device=cpu", "actor.dtype=float32", "actor.tensor_parallel=1")
    config = load_config(EXAMPLES / f"{example}.yaml", [f"model.path={model}", *device, *overrides])
    check(with_local_copies(config, download=False), example)


@pytest.mark.parametrize(
    ("example", "prompt"),
    [("higher_lower", "I think of a number from 1 to 100."), ("chain_sum", "<answer>")],
)
def test_an_example_passes_a_dry_run(
    model: Path, example: str, prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(model, example)
    shown = capsys.readouterr().err
    assert "nothing wrong found" in shown and prompt in shown
    assert "prompts and labels" in shown.partition("# checked:")[2].partition("# not")[0]


@pytest.mark.parametrize(
    ("example", "override", "message"),
    [
        ("chain_sum", "data.train=reasoning-gym:chain_sums", "did you mean chain_sum"),
        ("chain_sum", "data.tasks.settings.min_terms=9", "the task refuses them"),
        ("chain_sum", "reward.name=math", "reward.name: math cannot use the label"),
        ("higher_lower", "data.train=verifiers:higher", "'higher' not found"),
        ("higher_lower", "data.tasks.settings={player: {max_turns: many}}", "should be a valid integer"),
        ("higher_lower", "data.tasks.settings={taskset: {split: test}}", "problems are also in data.train"),
        ("higher_lower", "data={train: 'reasoning-gym:chain_sum', tasks: {size: 5}}", "has no column task"),
    ],
)
def test_a_mistake_is_an_error_before_anything_starts(model: Path, example: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dry_run(model, example, override)
