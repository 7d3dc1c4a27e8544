"""Expected seconds of a weight sync of large models over NCCL, from counted calls and bytes, beside those of the link.

    python benchmarks/weight_sync_model.py [--out benchmarks/results/weight_sync_model.json]

Nothing here was measured on a GPU. The calls into torch per tensor are counted on a CPU: small models with the tensors
of the large ones are published, packed into buckets, taken apart again and copied into place, as a sender and vLLM's
receiver do. The numbers of tensors, buckets and bytes are those of the large models. A call costs `CALL`, a bucket one
HTTP call and vLLM's call of its workers (`BUCKET_CALL`), and bytes the published rates of an H100
(`megatron_rl/utils/hardware.py`) times the share that a plan assumes for links. The sender collects a bucket while the
last one is on its way and an engine loads another, so a sync takes the longest of the three; `one after another` is
their sum, as it was before.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.check import Calls, worker_of
from benchmarks.machine import arguments, keep
from megatron_rl.config.weight_sync import WeightSyncSettings
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.published import known_config
from megatron_rl.models.weight_map import publish_hf_weights
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.parameters import model_parameters
from megatron_rl.utils.hardware import GPUS
from megatron_rl.utils.memory import Alternating
from megatron_rl.weight_sync.buckets import bucket_specs, flattened, unflatten

CALL, BUCKET_CALL = 15e-6, 10e-3
"""Assumed seconds of a call into torch from Python, launch included, and of the calls that announce a bucket."""
LINKS = Assumptions(mean_prompt=1, mean_response=1).links
CASES = [("Qwen3-32B", 4, 1), ("Qwen3-32B", 4, 4), ("Qwen3-30B-A3B", 1, 1), ("Qwen3-30B-A3B", 1, 2)]
"""Model, tensor-parallel ranks and pipeline stages."""
BUCKET = WeightSyncSettings().bucket_megabytes * 2**20


def count_calls(limit: int = 2**16) -> dict[str, float]:
    """Returns calls into torch per tensor: of a sender, and of an engine that copies each tensor into its place."""
    with tempfile.TemporaryDirectory() as folder:
        worker = worker_of(Path(folder))
        specs = worker.weight_specs() or []
        held = {spec.name: torch.empty(spec.shape) for spec in specs}
        for _ in range(2):  # the first pass allocates the buffers
            with Calls() as sender:
                tensors = publish_hf_weights(worker.model, worker.hf_config, reuse_memory=True)
                buckets = [flat.clone() for flat in flattened(tensors, limit, Alternating())]
        with Calls() as engine:
            for flat, bucket in zip(buckets, bucket_specs(specs, limit), strict=True):
                for name, tensor in unflatten(flat, bucket):
                    held[name].copy_(tensor.clone())
        worker.close()
    copies = len(specs)  # `copy_` into existing memory makes no new tensor, so the counter leaves it out
    return {
        "sender": (sender.calls - len(buckets) + copies) / len(specs),
        "engine": (engine.calls + copies) / len(specs),
    }


def tensors_of(model: Architecture) -> int:
    """Returns the number of tensors of a model's folder."""
    attention = 6 + 2 * model.qk_norm + 3 * model.qkv_bias
    total = 3 - model.tied
    for layer in range(model.layers):
        experts = model.experts if model.is_sparse(layer) else None
        total += attention + (3 * experts.count + 1 if experts else 3)
    return total


def expected(name: str, tensor: int, stages: int, calls: dict[str, float]) -> dict[str, Any]:
    model, gpu = Architecture.from_hf(known_config(Path(name))), GPUS["h100"]
    size, count = 2 * model_parameters(model), tensors_of(model)
    part, buckets = size / stages, stages * math.ceil(size / stages / BUCKET)
    link = part / (gpu.network * LINKS)
    collect = part * (tensor - 1) / tensor / (gpu.link * LINKS) + 4 * part / gpu.bandwidth
    sender = collect + count / stages * calls["sender"] * CALL
    engine = 4 * size / gpu.bandwidth + count * calls["engine"] * CALL + buckets * BUCKET_CALL
    return {
        "model": name,
        "tensor_parallel": tensor,
        "stages": stages,
        "gigabytes": size / 1e9,
        "tensors": count,
        "buckets": buckets,
        "link": link,
        "sender": sender,
        "engine": engine,
        "seconds": max(link, sender, engine) + (sender + engine) / buckets,
        "one after another": stages * (link + sender) + engine,
    }


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    calls = count_calls()
    columns = ("link", "sender", "engine", "seconds", "one after another")
    table = Table("model", "TP", "PP", "GB", "tensors", "buckets", *columns, title="seconds; not measured")
    found = [expected(*case, calls) for case in CASES]
    for case in found:
        seconds = (f"{case[column]:.2f}" for column in columns)
        sizes = (f"{case['gigabytes']:.1f}", f"{case['tensors']:,}", f"{case['buckets']}")
        table.add_row(case["model"], str(case["tensor_parallel"]), str(case["stages"]), *sizes, *seconds)
    Console().print(table, "calls into torch per tensor:", calls)
    assumed = {"call": CALL, "bucket_call": BUCKET_CALL, "links": LINKS, "bucket": BUCKET}
    keep(options.out, "weight_sync_model", assumed=assumed, calls=calls, cases=found)


if __name__ == "__main__":
    main()
