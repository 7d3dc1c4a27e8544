"""An RL step needs no memory for prompt length times vocabulary, and sums bf16 gradients in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.parallel.layout import Layout
from tests.hf_models import write_hf_model
from tests.unit.plan.measure import peak, rows

SHORT, LONG = 512, 1536
"""Lengths in tokens. The fused head projects 512 tokens at a time on a CPU."""
SMALL, LARGE = 1000, 3000
"""Vocabulary sizes."""
BYTES = 4 * (LONG - SHORT) * (LARGE - SMALL)
"""Size of fp32 logits for the difference in length times the difference in vocabulary."""


@contextmanager
def actor(model: Path, **settings: Any) -> Iterator[MegatronWorker]:
    worker = MegatronWorker(ActorSettings.model_validate({"device": "cpu"} | settings), Layout(), 0)
    worker.start("127.0.0.1", worker.open_port("127.0.0.1"), model)
    try:
        worker.load_hf(model)
        worker.set_loss(LossChoice.of(AlgorithmSettings(name="grpo")))
        worker.build_optimizer(OptimizerSettings(lr=1e-3, clip_grad=0.0))
        yield worker
    finally:
        worker.close()


def growth(tmp_path: Path, grows: str, **settings: Any) -> dict[str, float]:
    """Returns the part of each pass's peak memory that grows with length *times* vocabulary, relative to `BYTES`.

    grows: which length grows, "prompt" or "response".
    """
    peaks: dict[str, dict[tuple[int, int], int]] = {"train": {}, "score": {}}
    for vocabulary in (SMALL, LARGE):
        shape = {"vocab_size": vocabulary, "num_hidden_layers": 1, "hidden_size": 16, "max_position_embeddings": 4096}
        model = write_hf_model(tmp_path / f"{grows}-{vocabulary}", **shape)
        with actor(model, micro_batch_tokens=4096, **settings) as worker:
            for length in (SHORT, LONG):
                lengths = {"prompt": SHORT, "response": SHORT} | {grows: length}
                batch = rows(1, vocabulary=SMALL, **lengths)
                tokens = batch.num_sampled_tokens
                worker.train(batch, 0.0, tokens, 1.0)  # allocates what is allocated only once
                peaks["train"][vocabulary, length] = peak(lambda: worker.train(batch, 0.0, tokens, 1.0))  # noqa: B023
                peaks["score"][vocabulary, length] = peak(lambda: worker.score(batch, 1.0))  # noqa: B023
    signs = {
        (v, n): 1 if (v == SMALL) == (n == SHORT) else -1 for v, n in itertools.product((SMALL, LARGE), (SHORT, LONG))
    }
    return {name: sum(sign * found[at] for at, sign in signs.items()) / BYTES for name, found in peaks.items()}


@pytest.mark.parametrize("lm_head", ["fused", "materialised"])
def test_no_memory_is_used_for_logits_of_prompts(tmp_path: Path, lm_head: str) -> None:
    assert max(growth(tmp_path, "prompt", lm_head=lm_head).values()) < 0.01


def test_the_fused_head_uses_no_memory_for_logits_of_responses(tmp_path: Path) -> None:
    assert max(growth(tmp_path, "response", lm_head="fused").values()) < 0.01


def test_the_materialised_head_uses_memory_for_logits_of_responses(tmp_path: Path) -> None:
    """This test shows that the measurement detects logits."""
    assert min(growth(tmp_path, "response", lm_head="materialised").values()) > 0.99


def test_bf16_gradients_are_summed_in_fp32(tmp_path: Path) -> None:
    """The gradient of many micro-batches equals the fp64 sum of the gradients of each micro-batch alone."""
    model = write_hf_model(tmp_path / "model", noise=0.1)
    random = np.random.default_rng(0)
    batch = SequenceBatch.of([random.integers(0, 50, 8) for _ in range(24)], np.full(24, 3))
    batch = batch.with_values(advantages=batch.per_token(random.random(24) + 0.5).astype(np.float32))
    with actor(model, dtype="bfloat16", micro_batch_tokens=8) as worker:
        parameters = dict(worker.model.named_parameters())
        assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}

        def gradients(part: SequenceBatch) -> dict[str, torch.Tensor]:
            worker.train(part, 0.0, batch.num_sampled_tokens, 1.0)
            return {name: parameter.main_grad.clone() for name, parameter in parameters.items()}

        together = gradients(batch)
        assert {gradient.dtype for gradient in together.values()} == {torch.float32}
        alone = [gradients(batch.take([row])) for row in range(len(batch))]
    for name, gradient in together.items():
        expected = torch.stack([part[name].double() for part in alone]).sum(0)
        assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max(), name
