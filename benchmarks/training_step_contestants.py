"""The contestants of `training_step.py`: each takes training steps on the same recorded samples, one per request."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
import torch
from torch.profiler import record_function

import lpreg
from megatron_rl.batching.partition import partition
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config import Config, load_config
from megatron_rl.rollout.replay import Replay
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.batch import training_batch
from megatron_rl.types import RewardResult

QUICKSTART = Path("examples/quickstart/countdown.yaml")
SAME = ["algorithm.name=grpo", "algorithm.advantage=dr_grpo", "actor.tensor_parallel=1", "rollout.engines=1"]
"""Settings that TRL supports too: GRPO's clipped loss over all tokens, rewards less their group's mean, one trainer."""
QUIET = ["evaluation.suites={}", "evaluation.probes={}"]


class Pace:
    """Starts a step for each line on standard input, and answers with the time that the step took."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers

    def begin(self) -> None:
        """Waits for the next request. Raises EOFError if there are no more requests."""
        if not sys.stdin.readline():
            raise EOFError
        self.cpu, self.clock = processor_seconds(), time.perf_counter()

    def end(self, **values: Any) -> None:
        seconds = {"wall": time.perf_counter() - self.clock, "cpu": processor_seconds() - self.cpu}
        print(json.dumps(seconds | values), file=self.answers, flush=True)


def processor_seconds() -> float:
    """Returns the processor time of this process and all its descendants."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [me, *me.children(recursive=True)])


def quickstart(*overrides: str) -> Config:
    return load_config(QUICKSTART, [*SAME, *QUIET, "warm_start=null", *overrides])


class Recorded(Replay):
    """A replay that is read beforehand, so that reading is not part of a step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.steps = [super(Recorded, self).collect(step, 0) for step in range(1, len(self) + 1)]

    def collect(self, step: int, weight_version: int) -> Rollouts:
        return self.steps[step - 1]


def ours(pace: Pace, recording: Path, *, rollouts: bool = False) -> None:
    """The product's own step, with driver and Ray. `rollouts`: the step samples and grades; else it uses recordings."""
    from megatron_rl.loop import rl_step
    from megatron_rl.run.opening import open_run

    folder = Path(f"runs/benchmark-{os.getpid()}")
    source = (
        ["train.steps=1000"] if rollouts else [f"rollout.replay={recording}", f"train.steps={len(Recorded(recording))}"]
    )
    settings = [f"model.path={recording / 'hf'}", f"run.folder={folder}", "run.name=benchmark", *source]
    try:
        with open_run(quickstart(*settings, "observability.view=off", "observability.rollouts_every=0")) as run:
            if not rollouts:
                run.rollouts = Recorded(recording)
            while True:
                pace.begin()
                metrics = rl_step(run, run.step + 1)
                run.step += 1
                run.log(metrics)
                phases = {name[5:-8]: value for name, value in metrics.items() if name.endswith("_seconds")}
                pace.end(loss=metrics["train/loss"], grad_norm=metrics["train/grad_norm"], phases=phases)
    except EOFError:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scores_of(results: Sequence[RewardResult]) -> list[float]:
    return [result.score for result in results]


def batch_of(config: Config, rollouts: Rollouts) -> tuple[SequenceBatch, int]:
    """Returns the sequences with an advantage, and the number of tokens that the loss is a mean over."""
    batch, _ = training_batch(config, rollouts, scores_of)
    return batch.sequences.take(np.flatnonzero(batch.advantages)), batch.sequences.num_sampled_tokens


def megatron_alone(pace: Pace, recording: Path, *, rows: str = "auto") -> None:
    """One rank of the product's actor in this process, without driver and Ray. `rows`: the packing form."""
    from megatron_rl.actor.passes.policy_loss import LossChoice
    from megatron_rl.actor.worker import MegatronWorker
    from megatron_rl.parallel.layout import Layout

    config, steps = quickstart(f"model.path={recording / 'hf'}", f"actor.rows={rows}"), Recorded(recording)
    worker = MegatronWorker(config.actor, Layout(), 0)
    worker.start("127.0.0.1", worker.open_port("127.0.0.1"), config.model.path)
    worker.load_hf(config.model.path)
    worker.set_loss(LossChoice.of(config.algorithm))
    worker.build_optimizer(config.actor.optimizer)

    def step(rollouts: Rollouts) -> dict[str, float]:
        rows, tokens = batch_of(config, rollouts)
        result = worker.train(rows, config.actor.optimizer.lr, tokens, 1.0)
        assert result is not None
        return {"loss": result.loss, "grad_norm": result.grad_norm}

    _walk(pace, steps, step)


def plain(pace: Pace, recording: Path) -> None:
    """The same algorithm in plain torch and transformers, with lpreg's head and loss. Sequences of similar length are
    padded side by side."""
    from transformers import AutoModelForCausalLM

    config, steps = quickstart(), Recorded(recording)
    model = AutoModelForCausalLM.from_pretrained(recording / "hf", dtype=torch.float32).train()
    settings, loss = config.actor.optimizer, lpreg.make_loss("grpo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=0.0)

    def step(rollouts: Rollouts) -> dict[str, float]:
        rows, tokens = batch_of(config, rollouts)
        optimizer.zero_grad()
        total = 0.0
        for part in partition(rows.lengths.tolist(), 1, token_budget=config.actor.micro_batch_tokens, packed=False)[0]:
            batch = rows.take(part)
            ids = torch.zeros(len(batch), int(batch.lengths.max()), dtype=torch.int64)
            predicts = torch.zeros(ids.shape, dtype=torch.bool)
            for i, row in enumerate(batch.sequences):
                ids[i, : len(row)] = torch.from_numpy(row)
                predicts[i, np.flatnonzero(batch.mask_of(i)) - 1] = True
            with record_function("forward"):  # padding is on the right, so causal attention ignores it
                hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[predicts[:, :-1]]
            with record_function("loss"):
                stats = lpreg.fused_token_stats(hidden, model.lm_head.weight, torch.from_numpy(batch.targets).long())
                advantages = torch.from_numpy(batch.values["advantages"])
                inputs = lpreg.LossInputs(log_probs=stats.log_probs, advantages=advantages, denominator=tokens)
                output = loss(inputs).loss
            output.backward()
            total += output.item()
        with record_function("optimizer"):
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            optimizer.step()
        return {"loss": total, "grad_norm": float(grad_norm)}

    _walk(pace, steps, step)


def _walk(pace: Pace, steps: Recorded, step: Callable[[Rollouts], dict[str, float]]) -> None:
    try:
        for rollouts in steps.steps:
            pace.begin()
            pace.end(**step(rollouts))
    except EOFError:
        pass


def trl(pace: Pace, recording: Path, *, rollouts: bool = False) -> None:
    """TRL's own trainer and loss. `rollouts`: with TRL's generation and the task's verifier; else with recordings."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config, steps = quickstart(), Recorded(recording)
    place, seen, tokenizer = iter(steps.steps), {}, AutoTokenizer.from_pretrained(recording / "hf")

    class Paced(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if seen:
                pace.end(**seen)
            pace.begin()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            seen.update({name: logs[name] for name in ("loss", "grad_norm") if name in logs})

    def respond(prompts: list[Any], _: Any) -> dict[str, Any]:
        responses = next(place).responses
        seen["rewards"] = [reward.score for _, _, reward in responses]
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt, _, _ in responses],
            "completion_ids": [response.token_ids.tolist() for _, response, _ in responses],
            "logprobs": [response.log_probs.tolist() for _, response, _ in responses],
        }

    rows = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    optimizer, responses = config.actor.optimizer, config.rollout.max_response_tokens
    arguments = GRPOConfig(
        output_dir=f"runs/benchmark-{os.getpid()}",
        **{"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        **{"gradient_checkpointing": False, "logging_steps": 1, "max_steps": 1000, "shuffle_dataset": False},
        **{"per_device_train_batch_size": rows, "num_generations": config.rollout.samples_per_prompt},
        **{"max_completion_length": responses, "loss_type": "dapo", "scale_rewards": "none", "beta": 0.0},
        **{"learning_rate": optimizer.lr, "lr_scheduler_type": "constant", "adam_beta2": optimizer.betas[1]},
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(recording / "hf", dtype=torch.float32),
        partial(_graded, rollouts, seen, tokenizer.eos_token_id),
        arguments,
        Dataset.from_json(str(config.data.train)),
        processing_class=tokenizer,
        rollout_func=None if rollouts else respond,
        callbacks=[Paced()],
    )
    with suppress(EOFError, StopIteration):
        trainer.train()


def _graded(
    rollouts: bool, seen: dict[str, Any], end: int, completions: Any, completion_ids: Any, label: Any, **_: Any
) -> list[float]:
    """Returns the scores of the task's verifier, or the recorded ones."""
    from megatron_rl.reward.countdown import verify_countdown
    from megatron_rl.types import Prompt, Response, Sample

    if not rollouts:
        return seen.pop("rewards")
    scores = []
    for answer, ids, text in zip(label, completion_ids, completions, strict=True):
        sampled = Response(ids, [], "stop" if ids[-1] == end else "length", 0)
        scores.append(verify_countdown(Sample(Prompt("", (), "", answer), sampled, text)).score)
    return scores


CONTESTANTS: dict[str, Callable[[Pace, Path], None]] = {
    "ours": ours,
    "ours, one process": megatron_alone,
    "ours, one process, packed rows": partial(megatron_alone, rows="packed"),
    "plain loop": plain,
    "TRL": trl,
    "ours, with rollouts": partial(ours, rollouts=True),
    "TRL, with rollouts": partial(trl, rollouts=True),
}
