"""A mixture of experts trains with and without expert parallelism: weights reach the engine, the export is right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_rl.data.countdown.model import MAX_POSITIONS, VOCABULARY
from tests.e2e_cpu.conftest import CommandLine, Finished
from tests.hf_models import write_hf_model
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

LAYOUTS = {"experts": (), "expert_parallel": ("actor.data_parallel=2", "actor.expert_parallel=2")}
REWARD = """
from megatron_rl.types import RewardResult, Sample

def some(sample: Sample) -> RewardResult:
    return RewardResult(float(sample.response.token_ids.sum() % 3))
"""
"""An untrained model never gives a right answer, and without different rewards there is no gradient."""
COMPARED = ("train/loss", "train/grad_norm", "entropy/token_mean", "lpreg/delta", "response_length/mean")


def write_model(folder: Path, tokenizer: Path) -> None:
    """Writes a Qwen3-MoE with four experts, two of them per token, and with the Countdown task's vocabulary."""
    write_hf_model(folder, "qwen3_moe", vocab_size=len(VOCABULARY), max_position_embeddings=MAX_POSITIONS, noise=0.1)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    shutil.copy(tokenizer / "generation_config.json", folder)


@pytest.fixture(scope="module")
def runs(command_line: CommandLine) -> dict[str, Finished]:
    """Two steps under each layout. The checksums of every weight sync are compared."""
    model = command_line.folder / "experts"
    write_model(model, command_line.folder / "runs/countdown-task/model")
    (command_line.folder / "rewards.py").write_text(REWARD)
    settings = (
        f"model.path={model}",
        "reward.name=rewards:some",
        "warm_start=null",
        "evaluation={}",
        "observability.word_classes={}",
        "actor.tensor_parallel=1",
        "train.steps=2",
        "train.save_every=0",
        "rollout.engines=1",
        "rollout.prompts_per_step=4",
        "weight_sync.verify_every=1",
    )
    return {name: command_line.train(name, *settings, *layout) for name, layout in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixture_of_experts_trains(runs: dict[str, Finished], layout: str) -> None:
    run = runs[layout]
    assert run.status == 0, run.output[-3000:]
    assert len(run.metrics) == 3
    assert "largest logit difference to the actor" in run.output
    assert all(row["train/grad_norm"] > 0 for row in run.metrics[1:])


def test_expert_parallelism_changes_nothing(runs: dict[str, Finished]) -> None:
    for single, parallel in zip(runs["experts"].metrics[1:], runs["expert_parallel"].metrics[1:], strict=True):
        for metric in COMPARED:
            assert parallel[metric] == pytest.approx(single[metric], rel=1e-4, abs=1e-6), metric
