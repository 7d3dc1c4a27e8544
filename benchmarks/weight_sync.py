"""Bytes and seconds of a weight update, by transport and layout, beside the rate of the bare way.

    python benchmarks/weight_sync.py [--layers 10] [--out benchmarks/results/weight_sync.json]

A Qwen3 of 0.5 B parameters with random weights in bf16 (1.04 GB; about 6 GiB of memory), on actor ranks as a run has
them and one engine, a process each. By folder (in memory that is shared, or on disk) the embedded engine takes the
files; by broadcast over gloo a receiver copies each tensor into its place, as vLLM's does. Every update is whole: from
the ranks' shards to the engine's own tensors. The best of three.

The rate: the same bytes written to one file there and copied from it into memory, or broadcast in buckets of the same
size and copied, by the same two processes; and under tensor parallelism gathered between the ranks before.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import arguments, keep
from megatron_rl.actor import process_groups
from megatron_rl.actor.layout import Layout
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.config.actor import ActorSettings
from megatron_rl.rendezvous import open_port, store_at
from megatron_rl.weight_sync import process_group
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, unflatten
from megatron_rl.weight_sync.shared_memory import shared_folder
from megatron_rl.weight_sync.transport import FolderUpdate, GroupMember

SHAPE: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8},
    **{"head_dim": 128, "vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
LAYOUTS = {"one rank": Layout(), "TP 2": Layout(tensor=2), "PP 2": Layout(pipeline=2)}
TRANSPORTS = ("shared memory", "disk", "gloo")
BUCKET, REPEATS, HOST, TARGET = 256 * 2**20, 3, "127.0.0.1", 0.6
MINUTES = timedelta(minutes=10)


def write_model(folder: Path, layers: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", num_hidden_layers=layers, **SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)


class Together:
    """Processes that begin and end something at once, and tell each other values."""

    def __init__(self, port: int, size: int) -> None:
        self.store = store_at(HOST, port, MINUTES)
        self.size, self.count = size, 0

    def open_port(self, name: str) -> None:
        """For others who ask for it by name."""
        self.store.set(f"port-{name}", str(open_port(HOST)))

    def port(self, name: str) -> int:
        return int(self.store.get(f"port-{name}"))

    def meet(self) -> None:
        self.count += 1
        if self.store.add(f"met-{self.count}", 1) == self.size:
            self.store.set(f"all-{self.count}", "")
        self.store.wait([f"all-{self.count}"], MINUTES)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds until all are done."""
        self.meet()
        start = time.perf_counter()
        work()
        self.meet()
        return time.perf_counter() - start


def members(together: Together, stages: int, rank: int) -> list[GroupMember]:
    names = [f"stage-{i}" for i in range(stages)]
    return [GroupMember(name, HOST, together.port(name), "gloo", 2, rank, 600.0) for name in names]


def act(rank: int, layout: Layout, model: Path, folders: dict[str, Path], port: int) -> None:
    """A rank of the actor."""
    together = Together(port, layout.world_size + 1)
    worker = MegatronWorker(ActorSettings(device="cpu", dtype="bfloat16"), layout, rank)
    if rank == 0:
        together.open_port("actor")
        together.open_port("bare")
    worker.start(HOST, together.port("actor"), model)
    if worker.publishes():
        together.open_port(f"stage-{process_groups.pp_rank()}")
    worker.load_hf(model)
    specs = worker.weight_specs()
    together.store.set(f"specs-{rank}", json.dumps([(s.name, s.dtype, s.shape) for s in specs or []]))
    for transport in TRANSPORTS:
        for version in range(REPEATS):
            if version == 0:
                together.meet()
                stages, folder = layout.pipeline, folders[transport]
                worker.connect_weights(
                    members(together, stages, 0) if transport == "gloo" else [folder] * stages, BUCKET
                )
            found: list[Any] = []
            together.timed(lambda v=version, f=found: f.append(worker.push_weights(v, 0)))
            parts = [str(part) for part in found[0].parts] if found[0] else []
            together.store.set(f"parts-{transport}-{version}-{rank}", json.dumps(parts))
            together.timed(lambda: None)
        worker.disconnect_weights()
    bare_gather(together, layout, rank)
    bare_broadcast(together, sender=True) if rank == 0 else idle(together)
    together.meet()
    worker.close()


def idle(together: Together) -> None:
    for _ in range(REPEATS):
        together.timed(lambda: None)


def bare_gather(together: Together, layout: Layout, rank: int) -> None:
    """Nothing but the tensor-parallel gather, of shards as large as those of a layer's largest matrix."""
    shard = torch.zeros(SHAPE["hidden_size"] * SHAPE["intermediate_size"] // layout.tensor, dtype=torch.bfloat16)
    for _ in range(REPEATS):
        together.timed(
            lambda: process_groups.gather_shards(shard, process_groups.tp_group()) if layout.tensor > 1 else None
        )


def bare_broadcast(together: Together, *, sender: bool) -> None:
    """Buckets over gloo; the receiver copies what it got."""
    group = process_group.join(GroupMember("bare", HOST, together.port("bare"), "gloo", 2, 0 if sender else 1, 600.0))
    flat, mine = torch.zeros(BUCKET, dtype=torch.uint8), torch.ones(BUCKET, dtype=torch.uint8)

    def work() -> None:
        dist.broadcast(flat, group=group, group_src=0)
        if not sender:
            mine.copy_(flat)

    for _ in range(REPEATS):
        seconds = together.timed(work)
        if not sender:
            together.store.set("broadcast", str(min(seconds, float(together.store.get("broadcast")))))


def engine(layout: Layout, model: Path, folders: dict[str, Path], port: int, answer: Any) -> None:
    """The receiving process; puts seconds of each transport and of each bare rate."""
    from megatron_rl.rollout.transformers_engine import TransformersEngine

    together = Together(port, layout.world_size + 1)
    own = TransformersEngine(model, "cpu", "bfloat16")
    held, buffer = own.model.state_dict(), torch.zeros(BUCKET, dtype=torch.uint8)
    stages = layout.world_size // layout.pipeline
    first = [stage * stages for stage in range(layout.pipeline)]
    specs = [[TensorSpec(n, d, tuple(s)) for n, d, s in json.loads(together.store.get(f"specs-{r}"))] for r in first]
    total = sum(spec.nbytes for part in specs for spec in part)
    seconds: dict[str, list[float]] = {}
    for transport in TRANSPORTS:
        groups: list[Any] = []
        for version in range(REPEATS):
            if version == 0:
                together.meet()
                if transport == "gloo":
                    groups = [process_group.join(member) for member in members(together, layout.pipeline, 1)]
            push = together.timed(lambda g=groups: receive(g, specs, held, buffer))
            names = [f"parts-{transport}-{version}-{rank}" for rank in first]
            parts = tuple(Path(part) for name in names for part in json.loads(together.store.get(name)))
            take = together.timed(lambda v=version, p=parts: own.update_weights(FolderUpdate(v, p)) if p else None)
            seconds.setdefault(transport, []).append(push + take)
            seconds.setdefault(f"{transport}, push", []).append(push)
        for group in groups:
            process_group.leave(group)
    gather = min(together.timed(lambda: None) for _ in range(REPEATS))
    per_gather = 2 * SHAPE["hidden_size"] * SHAPE["intermediate_size"]
    gather *= total / per_gather if layout.tensor > 1 else 0
    together.store.set("broadcast", "inf")
    bare_broadcast(together, sender=False)
    bare = {"gloo": gather + float(together.store.get("broadcast")) * total / BUCKET}
    for transport in TRANSPORTS[:2]:
        bare[transport] = gather + min(bare_file(folders[transport] / "bare", held) for _ in range(REPEATS))
    together.meet()
    answer.put({"bytes": total, "bare": bare, "seconds": {name: min(values) for name, values in seconds.items()}})


def receive(
    groups: list[Any], specs: list[list[TensorSpec]], held: dict[str, torch.Tensor], buffer: torch.Tensor
) -> None:
    for group, stage in zip(groups, specs, strict=False):
        for bucket in bucket_specs(stage, BUCKET):
            flat = buffer[: sum(spec.nbytes for spec in bucket)]
            dist.broadcast(flat, group=group, group_src=0)
            for name, tensor in unflatten(flat, bucket):
                held[name].copy_(tensor)


def bare_file(path: Path, held: dict[str, torch.Tensor]) -> float:
    """All bytes written to a file, which then replaces the last one, and copied from the mapped file into memory."""
    buffers = [tensor.contiguous().view(torch.uint8).numpy() for tensor in held.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        for buffer in buffers:
            file.write(memoryview(buffer.reshape(-1)))
    fresh.replace(path)
    mapped, place = np.memmap(path, dtype=np.uint8, mode="r"), 0
    for buffer in buffers:
        buffer.reshape(-1)[:] = mapped[place : place + buffer.nbytes]
        place += buffer.nbytes
    return time.perf_counter() - start


def measure(layout: Layout, model: Path) -> dict[str, Any]:
    """Of one layout."""
    memory, disk = shared_folder(), Path(tempfile.mkdtemp(prefix="weights-", dir=Path("runs")))
    folders = {"shared memory": memory / "weights", "disk": disk / "weights", "gloo": disk}
    context = mp.get_context("spawn")
    answer, port = context.Queue(), open_port(HOST)
    processes = [
        context.Process(target=act, args=(rank, layout, model, folders, port)) for rank in range(layout.world_size)
    ]
    processes.append(context.Process(target=engine, args=(layout, model, folders, port, answer)))
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a process ended with exit code {process.exitcode}")
        return answer.get()
    finally:
        for process in processes:
            process.kill()
        for folder in (memory, disk):
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=10, help="of the model, 0.1 GB each")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    Path("runs").mkdir(exist_ok=True)
    table = Table("layout", "transport", "GB", "seconds", "of which push", "GB/s", "bare GB/s", "share", "target")
    found = {}
    with tempfile.TemporaryDirectory(dir="runs") as model:
        write_model(Path(model), options.layers)
        for name in options.layouts:
            found[name] = measure(LAYOUTS[name], Path(model))
            size = found[name]["bytes"] / 1e9
            for transport in TRANSPORTS:
                seconds, bare = found[name]["seconds"][transport], found[name]["bare"][transport]
                share = bare / seconds
                push = found[name]["seconds"][f"{transport}, push"]
                rates = (f"{seconds:.2f}", f"{push:.2f}", f"{size / seconds:.2f}", f"{size / bare:.2f}")
                met = "met" if share >= TARGET else "missed"
                table.add_row(name, transport, f"{size:.2f}", *rates, f"{share:.0%}", met)
    Console().print(table)
    keep(options.out, "weight_sync", settings=SHAPE | {"layers": options.layers, "bucket": BUCKET}, layouts=found)


if __name__ == "__main__":
    main()
