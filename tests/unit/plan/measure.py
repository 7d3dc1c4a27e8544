"""Measures the allocations of a real actor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_rl.actor import platform
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config.actor import ActorSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.parallel.layout import Layout
from tests.meeting import meeting_point


def peak(work: Callable[[], object]) -> int:
    """Returns the peak bytes that `work` allocates beyond those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def storage(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the tensors' storages, counting shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(settings: ActorSettings, batch: SequenceBatch, model_folder: Path, rank: int) -> dict[str, int]:
    layout = Layout(
        tensor=settings.tensor_parallel,
        pipeline=settings.pipeline_parallel,
        data=settings.data_parallel,
        sequence_parallel=settings.sequence_parallel,
    )
    worker = MegatronWorker(settings, layout, rank)
    worker.start(*meeting_point(worker, model_folder.with_suffix(".port")), model_folder)
    for parameter in worker.model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    worker.set_loss(LossChoice.of(AlgorithmSettings(name="grpo")))
    worker.build_optimizer(settings.optimizer)
    tokens = batch.num_sampled_tokens
    worker.train(batch, 1e-6, tokens, 1.0)  # the moments exist from here on
    parts = worker.optimizer.parts
    moments = [value for part in parts for state in part.optimizer.state.values() for value in state.values()]
    found = {
        "parameters": sum(parameter.numel() for parameter in worker.model.parameters()),
        "weights": storage(worker.model.parameters()),
        "gradients": storage(buffer.grad_data for chunk in worker.chunks for buffer in chunk.buffers),
        "moments": storage(value for value in moments if isinstance(value, Tensor)),
        "main weights": storage(worker.optimizer._main_weights()),
        "log-probs": peak(lambda: worker.score(batch, 1.0)),
    }
    step = worker.optimizer.step
    worker.optimizer.step = lambda lr: 0.0  # type: ignore[method-assign]
    found["forward and backward"] = peak(lambda: worker.train(batch, 1e-6, tokens, 1.0))
    found["optimizer"] = peak(lambda: step(1e-6))
    worker.close()
    return found


def rows(count: int, prompt: int, response: int, vocabulary: int) -> SequenceBatch:
    """Random sequences, all of one length."""
    random = np.random.default_rng(0)
    batch = SequenceBatch.of(
        [random.integers(0, vocabulary, prompt + response) for _ in range(count)], np.full(count, prompt)
    )
    return batch.with_values(
        rollout_log_probs=np.zeros(count * response, dtype=np.float32),
        advantages=random.normal(size=count * response).astype(np.float32),
    )


def run_rank(rank: int, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, int]]:
    """Returns, per case, the bytes of the state and of the peak of each pass, as torch's allocator reports them.

    A case has `actor`, its settings, and `rows`, the arguments of `rows`; FOLDER/<case> holds its model.
    """
    platform.prepare("cpu")
    return {
        name: measure(ActorSettings.model_validate(case["actor"]), rows(**case["rows"]), folder / name, rank)
        for name, case in cases.items()
    }
