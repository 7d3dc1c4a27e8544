"""Every pass under context parallelism returns what one rank returns.

Attention over parts of a sequence is Transformer Engine's, so a stand-in model without attention takes its place here:
the hidden state of a position depends on its token alone. tests/rehearsal has the real model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import lpreg
from megatron_rl.actor import platform
from megatron_rl.actor.passes import passes as module
from megatron_rl.actor.passes.head import Head
from megatron_rl.actor.passes.micro_batch import MicroBatch
from megatron_rl.actor.passes.passes import Passes
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.cluster.actors import merge_tables
from megatron_rl.config.actor import ActorSettings
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from tests import ranks
from tests.meeting import gathered

VOCABULARY, WIDTH, TEMPERATURE = 32, 8, 0.8
LP_REG = {"proxy_source": "old", "kl_estimator": "full", "min_p": 0.3}


def batch() -> SequenceBatch:
    random = np.random.default_rng(3)
    lengths, prompts = (9, 14, 7), (3, 1, 5)
    rows = SequenceBatch.of([random.integers(0, VOCABULARY, n) for n in lengths], prompts)
    count = rows.num_sampled_tokens
    return rows.with_values(
        wanted=random.random(count) < 0.5,
        proxy_wanted=random.random(count) < 0.5,
        probe_targets=random.integers(0, VOCABULARY, count),
        advantages=random.normal(size=count).astype(np.float32),
        old_log_probs=np.full(count, -3, dtype=np.float32),
        old_log_z=np.full(count, -0.1, dtype=np.float32),
        old_in_filter=random.random(count) < 0.9,
        selected=random.random(count) < 0.5,
    )


def results(passes: Passes, weight: torch.Tensor) -> dict[str, Any]:
    """Returns the results of all passes, merged over the ranks; the gradient is summed over them."""
    rows, loss = batch(), lpreg.make_loss("lp_reg", **LP_REG)
    found: dict[str, Any] = {}
    plain = rows.only(("advantages", "old_log_probs", "old_log_z", "old_in_filter", "selected"))
    calls = {
        "logits": lambda: passes.logits(plain),
        "candidates": lambda: passes.candidates(rows.only(("wanted",)), TEMPERATURE, 5),
        "scores": lambda: passes.score(plain, loss, TEMPERATURE),
        "probes": lambda: passes.score(rows.only(("probe_targets",)), loss, TEMPERATURE),
        "proxy": lambda: passes.score(rows.only(("proxy_wanted",)), loss, TEMPERATURE),
    }
    proxy = None
    for name, call in calls.items():
        values, proxy = merge_tables(rows, gathered(call()))
        found |= {f"{name}: {column}": torch.from_numpy(array) for column, array in values.items()}
    assert proxy is not None
    found |= {"counts": torch.from_numpy(proxy.counts), "log_q": torch.from_numpy(proxy.log_q)}
    stored = replace(plain.with_values(selected=proxy.counts > 0), proxy=proxy)
    trained = passes.gradients(stored, loss, 30.0, TEMPERATURE)
    found["loss"] = torch.tensor([part.loss for part in gathered(trained)])
    gradient = weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    return found | {"gradient": gradient}


def run_rank(rank: int, folder: Path, size: int) -> dict[str, Any]:
    device, layout = platform.prepare("cpu"), Layout(context=size)
    store = dist.FileStore(str(folder / f"store-{size}"), size)
    process_groups.init_process_groups(layout, rank=rank, store=store, device=device)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    model: Any = SimpleNamespace(head_weight=weight, config=SimpleNamespace(sequence_parallel=False))

    def schedule(chunks: Any, parts: list[MicroBatch], on_hidden: Any, *, backward: bool) -> list[Any]:
        collected = []
        for part in parts:
            with torch.set_grad_enabled(backward):
                loss, result = on_hidden(table[part.tokens].transpose(0, 1), part)
            if backward:
                loss.backward()
            collected.append(result)
        return collected

    module.run_schedule = schedule
    architecture: Any = SimpleNamespace(vocabulary=VOCABULARY, even_length=10.0)
    settings = ActorSettings(device="cpu", rows="packed", micro_batch_tokens=16)
    head = Head(model, VOCABULARY, fused=True)
    found = results(Passes([], head, architecture, settings, layout, device), weight)
    process_groups.destroy()
    return found


@pytest.mark.parametrize("size", [2])
def test_every_pass_gives_what_one_rank_gives(tmp_path: Path, size: int) -> None:
    (expected,) = ranks.run_ranks(run_rank, 1, tmp_path, 1)
    assert expected["counts"].sum() > 0 and expected["gradient"].abs().max() > 0
    for found in ranks.run_ranks(run_rank, size, tmp_path, size):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5, equal_nan=True)
