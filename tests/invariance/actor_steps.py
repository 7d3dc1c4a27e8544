"""The processes of `test_actor_layouts.py`: every rank of one layout takes the same RL steps under several settings.

`run_rank` writes the results of all ranks together to FOLDER/<variant>.pt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.actor import platform
from megatron_rl.actor.model import flex_tree
from megatron_rl.actor.optimizer.state import read_state
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.passes.results import merge_tables
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.models.weight_map import export_hf_weights
from megatron_rl.parallel.layout import Layout
from tests import flex_reference
from tests.meeting import gathered, meeting_point, sent_to

VOCABULARY = 51  # odd, so tensor parallelism pads the vocabulary
TEMPERATURE, DENOMINATOR, LEARNING_RATE = 0.9, 90.0, 1e-2
LOSSES = {
    "supervised": None,
    "lp_reg": {"name": "lp_reg", "proxy_source": "current", "lp_reg": {"kl_estimator": "full", "min_p": 0.3}},
    "entropy_bonus": {"name": "entropy_bonus"},
    "gspo": {"name": "gspo"},  # uses complete responses
}
# With this eps Adam's step is nearly linear in the gradient, so weights can be compared as closely as gradients.
OPTIMIZER = OptimizerSettings(lr=LEARNING_RATE, eps=1.0, clip_grad=0.5, weight_decay=0.1)


def batch() -> SequenceBatch:
    """Returns groups of a prompt and three responses, which share a prefix: one is a prefix of another, two are equal.

    The longest response of the first group contains tokens of a tool, and the first response of the second group ends
    in some: the model reads these, and no loss counts them.
    """
    random = np.random.default_rng(5)
    shape = [(3, (9, 2, 12)), (1, (6, 7, 5)), (6, (1, 10, 10))]
    tokens, masks = [], []
    for prompt, responses in shape:
        longest = random.integers(0, VOCABULARY, prompt + max(responses))
        for response, common in zip(responses, (4, 2, 10), strict=True):
            row = longest[: prompt + response].copy()
            row[prompt + common :] = random.integers(0, VOCABULARY, len(row[prompt + common :]))
            tokens.append(row)
            masks.append(np.arange(prompt + response) >= prompt)
    tokens[-1] = tokens[-2].copy()
    masks[2][6:10] = masks[3][-2:] = False
    rows = SequenceBatch.joined(tokens, masks)
    count = rows.num_sampled_tokens
    return rows.with_values(
        advantages=rows.per_token(random.normal(size=len(rows))).astype(np.float32),
        selected=random.random(count) < 0.4,
        old_log_probs=(-4 + 0.5 * random.normal(size=count)).astype(np.float32),
    )


def steps(rank: int, layout: Layout, variant: dict[str, Any], meeting: Path, folder: Path) -> dict[str, Any] | None:
    """Takes the steps. Returns the results of all ranks on rank 0, None elsewhere."""
    model = folder / variant.pop("model")
    variant.pop("flex", None)
    settings = ActorSettings.model_validate({"device": "cpu", "micro_batch_tokens": 24} | variant)
    sequence_parallel = settings.sequence_parallel
    worker = MegatronWorker(settings, replace(layout, sequence_parallel=sequence_parallel), rank)
    worker.start(*meeting_point(worker, meeting), model)
    rows = batch()
    sent = sent_to(worker, rows)
    found: dict[str, Any] = {}
    for name, algorithm in LOSSES.items():
        worker.load_hf(model)
        worker.set_loss(LossChoice.of(AlgorithmSettings.model_validate(algorithm)) if algorithm else None)
        worker.build_optimizer(OPTIMIZER)
        scored = gathered(worker.score(sent, TEMPERATURE))
        trained = gathered(worker.train(sent, LEARNING_RATE, DENOMINATOR, TEMPERATURE))
        state, _ = read_state(worker.optimizer, worker.model)
        tensors = {
            kind: gathered(dict(export_hf_weights(worker.model, worker.hf_config, values)))
            for kind, values in {"gradient": state["exp_avg"], "weights": None}.items()
        }
        found[name] = {
            "loss": sum(part.loss for part in trained),
            "grad_norm": trained[0].grad_norm if trained else None,
            "seen": merge_tables(rows, [part.table for part in trained])[0],
            "scored": merge_tables(rows, scored)[0],
            **{kind: {k: v for part in parts for k, v in part.items()} for kind, parts in tensors.items()},
        }
    found["logits"] = merge_tables(rows, gathered(worker.logits(sent)))[0]["logits"]
    dist.barrier()
    worker.close()
    return found if rank == 0 else None


def run_rank(rank: int, layout: Layout, variants: dict[str, dict[str, Any]], folder: Path) -> None:
    platform.prepare("cpu")
    for name, variant in variants.items():
        with by_flex() if variant.get("flex") else nullcontext():
            found = steps(rank, layout, variant, folder / f"{name}.port", folder)
        if found is not None:
            torch.save(as_tensors(found), folder / f"{name}.pt")


@contextmanager
def by_flex() -> Iterator[None]:
    """Makes the actor attend over prefix trees as it does with Transformer Engine's layers."""
    with (
        patch.object(platform, "uses_flex", lambda settings, device: True),
        patch.object(flex_tree, "kernel", lambda: flex_reference.attend),
    ):
        yield


def as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_tensors(item) for name, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
