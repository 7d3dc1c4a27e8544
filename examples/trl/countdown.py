"""Countdown under TRL: a supervised warm start, then GRPO with Lp-Reg. Takes some seven minutes on one core.

pip install -e '.[trl]' && python examples/trl/countdown.py
"""

from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer
from trl import GRPOConfig, SFTConfig, SFTTrainer

from lpreg import make_loss
from lpreg.integrations.trl import GRPOTrainer
from megatron_rl.data.countdown import write_task
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.types import Prompt, Response, Sample

TASK = Path("runs/countdown-task")
HERE = {"output_dir": "runs/countdown-trl", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
write_task(TASK)
tokenizer = AutoTokenizer.from_pretrained(TASK / "model")


def reward(completions, completion_ids, label, **_):
    """Returns 1 for a response that ends by itself with a right attempt, otherwise 0."""
    ends = ["stop" if ids[-1] == tokenizer.eos_token_id else "length" for ids in completion_ids]
    rows = zip(label, completion_ids, ends, completions, strict=True)
    samples = [Sample(Prompt("", (), "", x), Response(ids, [], end, 0), text) for x, ids, end, text in rows]
    return [verify_countdown(sample).score for sample in samples]


traces = concatenate_datasets([Dataset.from_parquet(f"{TASK}/warm_start_{phase}.parquet") for phase in "ab"])
traces = traces.map(lambda row: {"completion": " " + row["response"]}, remove_columns="response")
warm_start = SFTConfig(per_device_train_batch_size=128, learning_rate=2e-3, warmup_steps=50, num_train_epochs=1, **HERE)
supervised = SFTTrainer(f"{TASK}/model", warm_start, train_dataset=traces, processing_class=tokenizer)
supervised.train()

batch = {"per_device_train_batch_size": 128, "num_generations": 8, "max_completion_length": 46, "max_steps": 200}
optimizer = {"learning_rate": 3e-4, "lr_scheduler_type": "constant", "adam_beta2": 0.95}
watch = {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True, "per_device_eval_batch_size": 128}
GRPOTrainer(
    supervised.model,
    reward,
    GRPOConfig(**HERE, **batch, **optimizer, **watch),
    train_dataset=Dataset.from_json(f"{TASK}/train.jsonl"),
    eval_dataset=Dataset.from_json(f"{TASK}/held_out.jsonl"),
    processing_class=tokenizer,
    loss=make_loss("lp_reg", rho=0.05, proxy_source="lagged", require_below_proxy=True),
).train()
