"""Short runs of lpreg's trainer for TRL on a tiny fp64 model, which record all that a plain restatement needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func, which makes responses known beforehand

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

from lpreg import PolicyLoss
from lpreg.integrations.trl import GRPOTrainer
from megatron_rl.data.countdown.model import build_tokenizer
from tests.hf_models import hf_model

PROMPTS = ["1 2 3 > 6 :", "7 > 7 :", "4 4 > 8 :", "9 8 7 > 24 : wait", "3 5 > 15 :", "2 2 2 > 8 :"]
EQUALLY_LONG = [f"{x} {x + 1} {x + 2} > {2 * x} :" for x in range(1, 7)]
"""Prompts of one length, for runs that would pad differently: transformers computes rotary embeddings in fp32, where a
shift of positions shows."""
GENERATIONS, VOCAB, LONGEST = 4, 50, 7
CPU: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}

Weights = dict[str, Tensor]


@dataclass
class Update:
    """The data of one optimizer step on this rank."""

    weights: Weights
    """Weights at the start of the step."""
    micro_batches: list[dict[str, Any]] = field(default_factory=list)
    gradient: Weights = field(default_factory=dict)


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.generated_by: list[Weights] = []
        self.metrics: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.updates.append(Update(weights_of(model)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.updates[-1].gradient = {name.removeprefix("module."): grad.clone() for name, grad in gradients.items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.metrics.append(dict(logs))


class Recorded(GRPOTrainer):
    recorder: Recorder

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            self.recorder.updates[-1].micro_batches.append(dict(inputs))
        return super()._compute_loss(model, inputs)


def weights_of(model: Any) -> Weights:
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def respond(prompts: list[str], trainer: Recorded) -> dict[str, Any]:
    """Returns the same responses for the same places of a generation whatever the layout; a tenth of the tokens of each
    response are not written by the model."""
    trainer.recorder.generated_by.append(weights_of(trainer.model))
    first = trainer.accelerator.process_index * len(prompts)
    generation = len(trainer.recorder.generated_by)
    prompt_ids, responses, masks = [tokenizer()(prompt)["input_ids"] for prompt in prompts], [], []
    for place in range(first, first + len(prompts)):
        generator = torch.Generator().manual_seed(1000 * generation + place)
        length = int(torch.randint(1, LONGEST + 1, (1,), generator=generator))
        responses.append(torch.randint(3, VOCAB, (length,), generator=generator).tolist())
        masks.append((torch.rand(length, generator=generator) < 0.9).int().tolist())
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": responses,
        "env_mask": masks,
        "logprobs": [[0.0] * len(response) for response in responses],
    }


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(torch.tensor(ids).double().square().sum() % 7.3) for ids in completion_ids]


def run(
    loss: PolicyLoss | str,
    folder: Path,
    *,
    steps: int = 2,
    model: Any = None,
    prompts: Sequence[str] = PROMPTS,
    rollout_func: Any = respond,
    reward: Any = reward,
    **settings: Any,
) -> Recorder:
    """Trains the tiny model, or the given one, with 12 rows per update unless the settings say otherwise."""
    recorder = Recorder()
    own = {"proxy_refresh_steps": settings.pop("proxy_refresh_steps", 2), "advantage": settings.pop("advantage", None)}
    checkpoint = settings.pop("resume_from_checkpoint", None)
    config = {
        "per_device_train_batch_size": 12,
        "max_completion_length": LONGEST,
        "max_steps": steps,
        "num_generations": GENERATIONS,
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    trainer = Recorded(
        tiny_model() if model is None else model,
        reward,
        GRPOConfig(output_dir=str(folder), **(CPU | config | settings)),
        Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer(),
        rollout_func=rollout_func,
        callbacks=[recorder],
        loss=loss,
        **own,
    )
    trainer.recorder = recorder
    trainer.train(resume_from_checkpoint=checkpoint)
    return recorder


def tiny_model(**changes: Any) -> Any:
    return hf_model("qwen3", noise=0.12, vocab_size=VOCAB, **changes).double()
