"""Bytes and seconds of a weight update by transport and layout, compared with plain copies of as many bytes.

    python benchmarks/weight_sync.py [--layers 10] [--repeats 5] [--out benchmarks/results/weight_sync.json]

The model is a Qwen3 of 0.5 B parameters with random weights in bf16 (1.04 GB; about 6 GiB of memory). Actor ranks as in
a run and one engine have a process each. With a folder (in shared memory or on disk), the embedded engine reads the
files. With broadcast over gloo, a receiver copies each tensor into its place, as vLLM's does. Every update goes all the
way from the ranks' shards to the engine's own tensors.

After each update, the same processes make plain copies ("bare"): as many bytes, without meaning and from memory that is
ready, are written to one file by the first rank and read by the engine, or broadcast in buckets of the same size and
copied. Under tensor parallelism, the other ranks first send their bytes to the first rank, into memory that is ready
too, in pieces as large as the shard of a large matrix; nothing is assembled. The results are the best time of each, and
the median of each update's own share.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import cycle
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
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.config.actor import ActorSettings
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.utils.rendezvous import open_port, store_at
from megatron_rl.weight_sync import process_group
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, unflatten
from megatron_rl.weight_sync.folder import shared_folder
from megatron_rl.weight_sync.process_group import BroadcastGroup
from megatron_rl.weight_sync.transport import CollectiveUpdate, FolderUpdate, GroupMember, StageBuckets

SHAPE: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8},
    **{"head_dim": 128, "vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
LAYOUTS = {"one rank": Layout(), "TP 2": Layout(tensor=2), "PP 2": Layout(pipeline=2)}
TRANSPORTS = ("shared memory", "disk", "gloo")
BUCKET, HOST, TARGET = 256 * 2**20, "127.0.0.1", 0.6
MINUTES = timedelta(minutes=10)


def write_model(folder: Path, layers: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", num_hidden_layers=layers, **SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)


class Rendezvous:
    """A barrier and a store of values for the processes of the benchmark."""

    def __init__(self, port: int, size: int) -> None:
        self.store = store_at(HOST, port, MINUTES)
        self.size, self.count = size, 0

    def open_port(self, name: str) -> None:
        """Opens a port that the other processes look up by name."""
        self.store.set(f"port-{name}", str(open_port(HOST)))

    def port(self, name: str) -> int:
        return int(self.store.get(f"port-{name}"))

    def meet(self) -> None:
        self.count += 1
        if self.store.add(f"met-{self.count}", 1) == self.size:
            self.store.set(f"all-{self.count}", "")
        self.store.wait([f"all-{self.count}"], MINUTES)

    def timed(self, work: Callable[[], Any]) -> float:
        """Runs `work` at the same time as the other processes. Returns seconds until all of them are done."""
        self.meet()
        start = time.perf_counter()
        work()
        self.meet()
        return time.perf_counter() - start


def members(rendezvous: Rendezvous, stages: int, rank: int) -> list[GroupMember]:
    names = [f"stage-{i}" for i in range(stages)]
    return [GroupMember(name, HOST, rendezvous.port(name), "gloo", 2, rank, 600.0) for name in names]


def act(rank: int, layout: Layout, model: Path, folders: dict[str, Path], port: int, repeats: int) -> None:
    """The process of one rank of the actor."""
    rendezvous = Rendezvous(port, layout.world_size + 1)
    worker = MegatronWorker(ActorSettings(device="cpu", dtype="bfloat16"), layout, rank)
    if rank == 0:
        rendezvous.open_port("actor")
        rendezvous.open_port("bare")
    worker.start(HOST, rendezvous.port("actor"), model)
    if worker.publishes():
        rendezvous.open_port(f"stage-{process_groups.pp_rank()}")
    worker.load_hf(model)
    specs = worker.weight_specs()
    rendezvous.store.set(f"specs-{rank}", json.dumps([(s.name, s.dtype, s.shape) for s in specs or []]))
    bare = BareActor(rendezvous, layout, rank)
    for transport in TRANSPORTS:
        for version in range(repeats):
            if version == 0:
                rendezvous.meet()
                stages, folder = layout.pipeline, folders[transport]
                worker.connect_weights(
                    members(rendezvous, stages, 0) if transport == "gloo" else [folder] * stages, BUCKET
                )
            found: list[Any] = []
            rendezvous.timed(lambda v=version, f=found: f.append(worker.push_weights(v, 0)))
            parts = [str(part) for part in found[0].parts] if found[0] else []
            rendezvous.store.set(f"parts-{transport}-{version}-{rank}", json.dumps(parts))
            rendezvous.timed(lambda: None)
            rendezvous.timed(lambda t=transport: bare.push(None if t == "gloo" else folders[t] / "bare"))
            rendezvous.timed(lambda: None)
        worker.disconnect_weights()
    rendezvous.meet()
    worker.close()


def bare_group(rendezvous: Rendezvous, rank: int) -> dist.ProcessGroup:
    return process_group.join(GroupMember("bare", HOST, rendezvous.port("bare"), "gloo", 2, rank, 600.0))


def portions(total: int, largest: int) -> Iterator[int]:
    """Yields the sizes of the parts of `total`, each at most `largest`."""
    for start in range(0, total, largest):
        yield min(largest, total - start)


class BareActor:
    """A rank's part of the plain copies: the first tensor-parallel group sends its bytes to rank 0, which sends all."""

    def __init__(self, rendezvous: Rendezvous, layout: Layout, rank: int) -> None:
        self.rank, self.total, self.peers = rank, int(rendezvous.store.get("total")), layout.tensor
        self.group = None if rank else bare_group(rendezvous, 0)
        self.piece = 2 * SHAPE["hidden_size"] * SHAPE["intermediate_size"] // layout.tensor
        self.memory = torch.zeros(self.piece if rank else BUCKET, dtype=torch.uint8)

    def push(self, path: Path | None) -> None:
        """Sends the bytes by broadcast, or through a new file at `path`, which replaces the last one."""
        self._collect()
        if self.rank:
            return
        if path is None:
            for size in portions(self.total, BUCKET):
                dist.broadcast(self.memory[:size], group=self.group, group_src=0)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as file:
            for size in portions(self.total, self.piece):
                file.write(self.memory[:size].numpy().data)
        fresh.replace(path)

    def _collect(self) -> None:
        group = process_groups.tp_group()
        for size in portions(self.total // self.peers, self.piece):
            if 0 < self.rank < self.peers:
                dist.send(self.memory[:size], group=group, group_dst=0)
            for peer in range(1, self.peers if self.rank == 0 else 0):
                dist.recv(self.memory[:size], group=group, group_src=peer)


def engine(layout: Layout, model: Path, folders: dict[str, Path], port: int, repeats: int, answer: Any) -> None:
    """The process of the engine. Puts seconds of each transport, and of its plain copies, into `answer`."""
    from megatron_rl.rollout.engines.transformers.engine import TransformersEngine

    rendezvous = Rendezvous(port, layout.world_size + 1)
    own = TransformersEngine(model, "cpu", "bfloat16")
    held, buffer, second = own.model.state_dict(), *torch.zeros(2, BUCKET, dtype=torch.uint8)
    stages = layout.world_size // layout.pipeline
    first = [stage * stages for stage in range(layout.pipeline)]
    specs = [[TensorSpec(n, d, tuple(s)) for n, d, s in json.loads(rendezvous.store.get(f"specs-{r}"))] for r in first]
    total = sum(spec.nbytes for part in specs for spec in part)
    rendezvous.store.set("total", str(total))
    bare_members, place = bare_group(rendezvous, 1), torch.ones(total, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {}
    bare: dict[str, list[float]] = {}
    for transport in TRANSPORTS:
        groups: dict[str, BroadcastGroup] = {}
        for version in range(repeats):
            if version == 0:
                rendezvous.meet()
                if transport == "gloo":
                    groups = {m.name: BroadcastGroup(m) for m in members(rendezvous, layout.pipeline, 1)}
            push = rendezvous.timed(lambda g=groups: receive(g, specs, held, [buffer, second]))
            names = [f"parts-{transport}-{version}-{rank}" for rank in first]
            parts = tuple(Path(part) for name in names for part in json.loads(rendezvous.store.get(name)))
            take = rendezvous.timed(lambda v=version, p=parts: own.update_weights(FolderUpdate(v, p)) if p else None)
            seconds.setdefault(transport, []).append(push + take)
            seconds.setdefault(f"{transport}, push", []).append(push)
            if transport == "gloo":
                bare_push = rendezvous.timed(lambda: bare_receive(bare_members, buffer, place))
                bare_take = rendezvous.timed(lambda: None)
            else:
                bare_push = rendezvous.timed(lambda: None)
                bare_take = rendezvous.timed(lambda t=transport: bare_read(folders[t] / "bare", place))
            bare.setdefault(transport, []).append(bare_push + bare_take)
        for group in groups.values():
            group.leave()
    rendezvous.meet()
    answer.put(
        {
            "bytes": total,
            "bare": {name: min(values) for name, values in bare.items()},
            "seconds": {name: min(values) for name, values in seconds.items()},
            "median share": {
                name: statistics.median(b / s for b, s in zip(bare[name], seconds[name], strict=True)) for name in bare
            },
        }
    )


def receive(
    groups: dict[str, BroadcastGroup],
    specs: list[list[TensorSpec]],
    held: dict[str, torch.Tensor],
    buffers: list[torch.Tensor],
) -> None:
    """Receives a bucket while it copies the one before, as vLLM's receiver does; the stages take turns."""
    stages = zip(groups, specs, strict=False)
    order = CollectiveUpdate(
        0, tuple(StageBuckets(name, bucket_specs(part, BUCKET)) for name, part in stages)
    ).portions()
    flats = [
        buffer[: sum(spec.nbytes for spec in bucket)]
        for buffer, (_, bucket) in zip(cycle(buffers), order, strict=False)
    ]
    for i, (group, bucket) in enumerate(order):
        if i == 0:
            groups[group].start(flats[0])
        groups[group].finish()
        if i + 1 < len(order):
            groups[order[i + 1][0]].start(flats[i + 1])
        for name, tensor in unflatten(flats[i], bucket):
            held[name].copy_(tensor)


def bare_receive(group: dist.ProcessGroup, buffer: torch.Tensor, place: torch.Tensor) -> None:
    for part in place.split(BUCKET):
        received = buffer[: part.nbytes]
        dist.broadcast(received, group=group, group_src=0)
        part.copy_(received)


def bare_read(path: Path, place: torch.Tensor) -> None:
    place.numpy()[:] = np.memmap(path, dtype=np.uint8, mode="r")


def measure(layout: Layout, model: Path, repeats: int) -> dict[str, Any]:
    """Returns the times of one layout."""
    memory, disk = shared_folder(), Path(tempfile.mkdtemp(prefix="weights-", dir=Path("runs")))
    folders = {"shared memory": memory / "weights", "disk": disk / "weights", "gloo": disk}
    context = mp.get_context("spawn")
    answer, port = context.Queue(), open_port(HOST)
    processes = [
        context.Process(target=act, args=(rank, layout, model, folders, port, repeats))
        for rank in range(layout.world_size)
    ]
    processes.append(context.Process(target=engine, args=(layout, model, folders, port, repeats, answer)))
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
    parser.add_argument("--layers", type=int, default=10, help="layers of the model, 0.1 GB each")
    parser.add_argument("--repeats", type=int, default=5, help="updates per transport")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    Path("runs").mkdir(exist_ok=True)
    table = Table("layout", "transport", "s", "push s", "GB/s", "bare GB/s", "share", "median", "target")
    found = {}
    with tempfile.TemporaryDirectory(dir="runs") as model:
        write_model(Path(model), options.layers)
        for name in options.layouts:
            found[name] = measure(LAYOUTS[name], Path(model), options.repeats)
            size = found[name]["bytes"] / 1e9
            for transport in TRANSPORTS:
                seconds, bare = found[name]["seconds"][transport], found[name]["bare"][transport]
                share = bare / seconds
                push = found[name]["seconds"][f"{transport}, push"]
                rates = (f"{seconds:.2f}", f"{push:.2f}", f"{size / seconds:.2f}", f"{size / bare:.2f}")
                median = found[name]["median share"][transport]
                met = "met" if share >= TARGET else "missed"
                table.add_row(name, transport, *rates, f"{share:.0%}", f"{median:.0%}", met)
    table.title = f"{size:.2f} GB"
    Console().print(table)
    keep(options.out, "weight_sync", settings=SHAPE | {"layers": options.layers, "bucket": BUCKET}, layouts=found)


if __name__ == "__main__":
    main()
