"""What the ranks of a rehearsal do, one function per kind of case.

Each function takes (rank, folder) and reads FOLDER/case.json.

Rank 0 writes FOLDER/found.json. The steps of layouts are those of `tests/gpu/actor_on.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lpreg.losses.registry import METHODS
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.checkpoint.manifest import FORMAT, DriverState, Manifest, Origin, write_manifest
from megatron_rl.cluster.actors import merge_tables
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import open_weights
from megatron_rl.models.weight_map import _entry, export_hf_weights
from megatron_rl.parallel.layout import layout_of
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select
from megatron_rl.training.update import update
from tests.gpu import actor_on
from tests.invariance import method_steps
from tests.meeting import gathered, meeting_point
from tests.unit.plan.measure import rows

LEARNING_RATE = 1e-3


def read_case(folder: Path) -> dict[str, Any]:
    case: dict[str, Any] = json.loads((folder / "case.json").read_text())
    return case


def write_found(rank: int, folder: Path, found: Any) -> None:
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def started(rank: int, folder: Path, model: Path, actor: dict[str, Any]) -> MegatronWorker:
    """Returns a worker that has built its model and joined the other ranks."""
    os.environ["LOCAL_RANK"] = str(rank)
    settings = ActorSettings.model_validate(actor)
    worker = MegatronWorker(settings, layout_of(settings), rank)
    worker.start(*meeting_point(worker, folder / f"{model.name}.port"), model)
    return worker


def names(rank: int, folder: Path) -> None:
    """Finds what every parameter of every family is in the weight map, and how Megatron marks it."""
    case, found = read_case(folder), {}
    for name, model in case["models"].items():
        worker = started(rank, folder, Path(model), case["actor"] | case["settings"].get(name, {}))
        architecture = Architecture.from_hf(worker.hf_config)
        found[name] = [
            described(worker, architecture, parameter, tensor) for parameter, tensor in worker.model.named_parameters()
        ]
        worker.close()
    write_found(rank, folder, found)


def described(worker: MegatronWorker, architecture: Architecture, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    try:
        entry = _entry(worker.model, architecture, name)
    except RuntimeError as error:
        return {"name": name, "error": str(error)}
    split = bool(getattr(tensor, "tensor_model_parallel", False))
    return {
        "name": name,
        "hf": list(entry.hf_names),
        "kind": entry.rule.kind,
        "split": getattr(tensor, "partition_dim", -1) if split else None,
        "sequence": bool(getattr(tensor, "sequence_parallel", False)),
        "expert": not getattr(tensor, "allreduce", True),
    }


def steps(rank: int, folder: Path) -> None:
    actor_on.run_rank(rank, folder)


def state(rank: int, folder: Path) -> None:
    """Exports, keeps a snapshot, trains, writes a checkpoint, trains on, and resumes from the checkpoint."""
    case = read_case(folder)
    model = Path(case["model"])
    worker = started(rank, folder, model, case["actor"])
    worker.load_hf(model)
    worker.set_loss(LossChoice.of(AlgorithmSettings(name="grpo")))
    worker.build_optimizer(OptimizerSettings(lr=LEARNING_RATE, eps=1e-3))
    batch = rows(**case["rows"])
    source = open_weights(model)
    exported = {name: tensor.cpu() for name, tensor in export_hf_weights(worker.model, worker.hf_config)}
    different = [name for name, tensor in exported.items() if not torch.equal(tensor, source[name].to(tensor.dtype))]
    specs = worker.weight_specs()
    before = gathered(worker.score(batch, 1.0))
    worker.snapshot("lagged")
    train = [gathered(worker.train(batch, LEARNING_RATE, batch.num_sampled_tokens, 1.0)) for _ in range(2)]
    lagged = gathered(worker.score(batch, 1.0, "lagged"))
    checkpoint, export = folder / "checkpoint", folder / "export"
    for path in (checkpoint, export):
        path.mkdir(exist_ok=True)
    parts = gathered(worker.write_state(checkpoint))
    after = gathered(worker.train(batch, LEARNING_RATE, batch.num_sampled_tokens, 1.0))
    if rank == 0:
        files = {name: file for part in parts for name, file in part.files.items()}
        origin = Origin({}, {}, "", {})
        write_manifest(checkpoint, Manifest(FORMAT, DriverState(0, 0, {}), {}, origin, parts[0].optimizer_steps, files))
    dist.barrier()
    worker.load(checkpoint)
    resumed = gathered(worker.train(batch, LEARNING_RATE, batch.num_sampled_tokens, 1.0))
    shards = gathered(worker.export_hf(export))
    found = {
        "exported": sorted({name for part in gathered(list(exported)) for name in part}),
        "different": [name for part in gathered(different) for name in part],
        "published": sum(len(part) for part in gathered(specs)),
        "written": sum(len(shard.tensors) for part in shards for shard in part),
        "scores": [table.values["log_probs"].tolist() for table in before],
        "lagged": [table.values["log_probs"].tolist() for table in lagged],
        "trained": [part[0].grad_norm for part in train],
        "after": [after[0].grad_norm, after[0].loss],
        "resumed": [resumed[0].grad_norm, resumed[0].loss],
    }
    write_found(rank, folder, found)
    worker.close()


def methods(rank: int, folder: Path) -> None:
    """Takes an on-policy and an off-policy update with every method, driven by the driver's own functions."""
    case, found = read_case(folder), {}
    model = Path(case["model"])
    worker = started(rank, folder, model, case["actor"])
    for snapshot in ("lagged", "reference"):
        worker.load_hf(Path(case[snapshot]))
        worker.snapshot(snapshot)
    actors = method_steps.AllRanks(worker)
    before = training_batch(case["rows"])
    for name in METHODS:
        learner = method_steps.learner_of(method_steps.METHODS[name], 2, actors)
        worker.load_hf(model)
        worker.set_loss(LossChoice.of(learner.config.algorithm))
        after, metrics = select(learner, score_old_policy(learner, before), 7)
        after = score_reference(learner, score_lagged_policy(learner, 2, after))
        worker.load_hf(Path(case["new"]))
        worker.build_optimizer(OptimizerSettings(clip_grad=0.0))  # its fp32 weights are those that were loaded last
        after, updated = update(learner, 2, after, lr=0.0, seed=7)
        numbers = {key: value for key, value in (metrics | updated).items() if not key.startswith("perf/")}
        found[name] = {key: float(value) for key, value in numbers.items()}
    write_found(rank, folder, found)
    worker.close()


def training_batch(shape: dict[str, int]) -> TrainingBatch:
    """Returns random sequences in groups, of which two groups have no advantage."""
    batch = rows(**shape)
    count, samples = len(batch), method_steps.SAMPLES
    groups = np.repeat(np.arange(count // samples), samples)
    advantages = np.random.default_rng(4).normal(size=count).round(2)
    advantages[np.isin(groups, (1, 4))] = 0.0
    log_probs = np.random.default_rng(5).normal(-5.0, 1.0, batch.num_sampled_tokens).astype(np.float32)
    batch = batch.with_values(advantages=batch.per_token(advantages).astype(np.float32), rollout_log_probs=log_probs)
    return TrainingBatch(batch, groups, advantages, np.ones(batch.num_sampled_tokens, dtype=bool))


def waits(rank: int, folder: Path) -> None:
    """Counts where rank 0 waits for the GPU and copies to it, per micro-batch and per step."""
    case = read_case(folder)
    model = Path(case["model"])
    worker = started(rank, folder, model, case["actor"])
    worker.load_hf(model)
    settings = AlgorithmSettings.model_validate({"name": "lp_reg", "lp_reg": case["lp_reg"]})
    worker.set_loss(LossChoice.of(settings))
    worker.build_optimizer(OptimizerSettings(lr=LEARNING_RATE))
    small, large = (scored(worker, rows(**case["rows"] | {"count": count})) for count in case["counts"])
    parts = [len(worker.passes._share(batch)) for batch in (small, large)]
    found = {}
    for name, work in {
        "scores": lambda batch: worker.score(batch, 1.0),
        "scores with a proxy": lambda batch: worker.score(marking(batch, "proxy_wanted"), 1.0),
        "candidates": lambda batch: worker.candidates(marking(batch, "wanted"), 1.0, 4),
        "gradients": lambda batch: worker.passes.gradients(batch, worker.loss, batch.num_sampled_tokens, 1.0),
    }.items():
        work(small)  # what happens once only is over
        few, many = counted(lambda work=work: work(small)), counted(lambda work=work: work(large))
        found[f"{name}, per micro-batch"] = {key: (many[key] - few[key]) / (parts[1] - parts[0]) for key in many | few}
        found[f"{name}, per pass"] = {
            key: few[key] - found[f"{name}, per micro-batch"][key] * parts[0] for key in many | few
        }
    found["optimizer, per step"] = dict(counted(lambda: worker.optimizer.step(LEARNING_RATE)))
    write_found(rank, folder, found)
    worker.close()


def scored(worker: MegatronWorker, batch: SequenceBatch) -> SequenceBatch:
    """Returns the batch with what Lp-Reg reads of the old policy, its proxy included, and a selection."""
    selected = np.random.default_rng(1).random(batch.num_sampled_tokens) < 0.2
    batch = batch.with_values(selected=selected)
    scores, proxy = merge_tables(batch, gathered(worker.score(marking(batch, "proxy_wanted"), 1.0)))
    assert proxy.counts[selected].all() and not proxy.counts[~selected].any()
    values = {name: scores[name] for name in ("log_probs", "log_z", "in_filter")}
    return replace(batch.with_values(**{f"old_{name}": value for name, value in values.items()}), proxy=proxy)


def marking(batch: SequenceBatch, mark: str) -> SequenceBatch:
    """Returns the batch with its selection as a mark of tokens, and no other value."""
    return batch.only(()).with_values(**{mark: batch.values["selected"]})


def counted(work: Callable[[], object]) -> Counter[str]:
    """Returns "kind | owner | place" -> number."""
    from host_tensors import Waits  # type: ignore[import-not-found]

    with Waits.counted() as found:
        work()
    return Counter({" | ".join(place): number for place, number in found.items()})


WORKS: dict[str, Callable[[int, Path], None]] = {
    "names": names,
    "steps": steps,
    "state": state,
    "methods": methods,
    "waits": waits,
}
