"""Typical data of users: verl's schema in parquet, a chat template, another model family, math-verify."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.e2e_cpu.conftest import REPOSITORY, CommandLine, values
from tests.hf_models import write_hf_model
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

PROBLEMS = REPOSITORY / "tests/fixtures/maths_verl.parquet"
TEMPLATE = "{% for message in messages %}<user>{{ message.content }}{% endfor %}<assistant>"


def write_model(folder: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """Writes a Qwen2 of 0.1M parameters (QKV bias, untied head) and a byte-level tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=501, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    write_hf_model(
        folder,
        "qwen2",
        vocab_size=len(fast),  # odd, so that two ranks must pad the vocabulary
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=256,
        eos_token_id=fast.eos_token_id,
    )
    return fast


def test_fifty_maths_problems_train_two_steps(command_line: CommandLine) -> None:
    rows = pq.read_table(PROBLEMS).to_pylist()
    answers = [rf"\boxed{{{row['reward_model']['ground_truth']}}}<eos>" for row in rows]
    folder = command_line.folder / "maths"
    tokenizer = write_model(folder / "model", [row["prompt"][0]["content"] for row in rows] + answers)
    prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    pq.write_table(pa.table({"prompt": prompts, "response": answers}), folder / "traces.parquet")
    config = {
        "model": {"path": "maths/model"},
        "data": {"train": str(PROBLEMS), "template": "chat", "max_prompt_tokens": 120},
        # Makes some answers right: without any right answer there is nothing to learn.
        "warm_start": {
            "cache_folder": "maths/cache",
            "batch_size": 50,
            "phases": [{"data": "maths/traces.parquet", "steps": 120, "lr": 5e-3}],
        },
        "rollout": {"prompts_per_step": 16, "samples_per_prompt": 4, "max_response_tokens": 32},
        "reward": {"name": "math"},
        "algorithm": {"preset": "paper"},
        "actor": {"tensor_parallel": 2, "optimizer": {"lr": 1e-4}},
        "train": {"steps": 2},
        "observability": {"rollouts_every": 1},
    }
    (folder / "maths.yaml").write_text(yaml.safe_dump(config))
    run = command_line.train("maths", config=folder / "maths.yaml")

    assert run.status == 0, run.output[-5000:]
    assert "(verl schema)" in run.output
    assert len(values(run, "train/loss")) == 2
    assert any(0 < reward < 1 for reward in values(run, "reward/mean"))
    assert max(values(run, "train/grad_norm")) > 0
    assert max(values(run, "reward/error_fraction")) == 0
    details = pq.read_table(run.folder / "rollouts/step_000001.parquet", columns=["detail"])["detail"].to_pylist()
    assert "correct" in details
