"""The ranks of `test_actor_on_cuda.py`, on any device: they take the same RL steps and write the results.

Run as: actor_on.py FOLDER, with FOLDER/case.json: {"actor": settings, "model": folder, "rows": arguments of
`measure.rows`, "steps": number}. `"load": false` leaves the weights random. Rank 0 writes FOLDER/found.json and
FOLDER/logits.pt.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.passes.results import merge_tables
from megatron_rl.actor.platform.environment import rank_environment
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.parallel.layout import layout_of
from tests.meeting import gathered, meeting_point
from tests.unit.plan.measure import rows

LEARNING_RATE = 1e-3
TEMPERATURE = 1.0


def run_rank(rank: int, folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    actor = ActorSettings.model_validate(case["actor"])
    os.environ["LOCAL_RANK"] = str(rank)
    model = Path(case["model"])
    worker = MegatronWorker(actor, layout_of(actor), rank)
    found: dict[str, Any] = {"description": worker.start(*meeting_point(worker, folder / "port"), model)}
    if case.get("load", True):
        worker.load_hf(model)
    else:
        for parameter in worker.model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.02)
    worker.set_loss(LossChoice.of(AlgorithmSettings(name="grpo")))
    worker.build_optimizer(OptimizerSettings(lr=LEARNING_RATE, eps=1e-3))
    batch = rows(**case["rows"])
    prompt = case["rows"]["prompt"]
    for row, tokens in enumerate(batch.sequences):  # groups of four, so that local layers have positions to share
        tokens[:prompt] = batch.sequence(row - row % 4)[:prompt]
    found |= steps(worker, batch, case["steps"], case.get("watch", False))
    if case.get("logits", True):
        logits = gathered(worker.logits(batch))
        if rank == 0:
            torch.save(torch.from_numpy(merge_tables(batch, logits)[0]["logits"]), folder / "logits.pt")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    worker.close()


def steps(worker: MegatronWorker, batch: SequenceBatch, count: int, watch: bool) -> dict[str, Any]:
    """Takes `count` steps. `watch`: the host's waits for the GPU are then counted over one further step."""
    losses, norms, seconds = [], [], []
    on_gpu = worker.device.type == "cuda"
    for _ in range(count):
        start = time.perf_counter()
        parts = gathered(worker.train(batch, LEARNING_RATE, batch.num_sampled_tokens, TEMPERATURE))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(sum(part.loss for part in parts))
        norms.append(parts[0].grad_norm)
    found = {"losses": losses, "grad_norms": norms, "seconds": seconds}
    if watch:
        found["synchronisations"] = synchronisations(
            lambda: worker.train(batch, LEARNING_RATE, batch.num_sampled_tokens, TEMPERATURE)
        )
    return found | {"peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}


def synchronisations(work: Callable[[], object]) -> dict[str, int]:
    """Returns how often the host waits for the GPU during `work`, by file and line, as CUDA builds of torch report."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return dict(Counter(f"{Path(warning.filename)}:{warning.lineno}" for warning in waits).most_common())


def main(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    actor = ActorSettings.model_validate(case["actor"])
    if actor.device == "cuda":
        os.environ |= rank_environment(actor)  # as Ray's workers get it
    torch.multiprocessing.start_processes(run_rank, (folder,), actor.world_size, start_method="spawn")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
