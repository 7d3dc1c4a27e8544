"""The actor: one process a rank, called as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.passes.results import Snapshot, Sums, Table, TrainResult, Weights, add_up
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.checkpoint.hf_shards import HfShard
from megatron_rl.checkpoint.manifest import RankPart
from megatron_rl.cluster.runtime import Nodes, host_process, results
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import read_config
from megatron_rl.parallel.layout import Layout
from megatron_rl.plan.flops import pass_flops
from megatron_rl.plan.hardware import known_gpu
from megatron_rl.weight_sync.buckets import TensorSpec

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings, OptimizerSettings


CLOSE_SECONDS = 5
"""How long all ranks together get to end by themselves."""
SETTLE_SECONDS = 60
"""How long the other ranks get to end what they do when one has failed."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """An optimizer step over all replicas."""

    values: dict[str, np.ndarray]
    """Name -> [T]: log_probs, entropy, log_z, kept, as they were before the update."""
    loss: float
    metrics: Sums
    grad_norm: float
    """Before clipping."""


class Actors:
    """All ranks of the Megatron actor. Its weights come by `load_hf`."""

    def __init__(self, settings: ActorSettings, layout: Layout, model_folder: Path, logs: Path, nodes: Nodes) -> None:
        self.stages = layout.pipeline
        self.ranks = [
            host_process(
                "megatron_rl.actor.worker:MegatronWorker",
                (settings, layout, rank),
                log_file=logs / f"actor-rank-{rank}.log",
                nodes=nodes,
                node=node,
                gpus=int(nodes.placement.on_gpu),
            )
            for rank, node in enumerate(nodes.placement.actors)
        ]
        if nodes.placement.shared:
            nodes.rank_devices = results([rank.devices.remote() for rank in self.ranks])
        host = results([self.ranks[0].node_address.remote()])[0]
        port = results([self.ranks[0].call.remote("open_port", host)])[0]
        self.description: str = self._all("start", host, port, model_folder)[0]
        self.gpu = known_gpu(results([self.ranks[0].call.remote("device_name")])[0])
        """None on a CPU, and on a GPU of unknown rate."""
        self._model = Architecture.from_hf(read_config(model_folder))
        self._flops = 0.0

    def _submit(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        return [rank.call.remote(method, *args) for rank in self.ranks]

    def _sent(self, batch: SequenceBatch) -> SequenceBatch | ray.ObjectRef:
        """As an argument of `_submit`: several ranks read one copy, a single one gets it with the call."""
        return ray.put(batch) if len(self.ranks) > 1 else batch

    def _all(self, method: str, *args: Any) -> list[Any]:
        return results(self._submit(method, *args))

    def take_flops(self) -> float:
        """Operations of the model's passes over the batches since the last call, all ranks together, each row as if it
        ran alone; what is computed again in the backward to save memory is not among them."""
        flops, self._flops = self._flops, 0.0
        return flops

    def _count(self, batch: SequenceBatch, passes: int) -> None:
        """passes: forwards; a backward is worth two."""
        self._flops += passes * pass_flops(self._model, batch.lengths.tolist(), batch.num_sampled_tokens)

    def prepare(self, loss: LossChoice | None, optimizer: OptimizerSettings) -> None:
        """A policy loss (None: supervised training) and a fresh optimizer for it."""
        self._all("set_loss", loss)
        self._all("build_optimizer", optimizer)

    def load_hf(self, folder: Path) -> None:
        self._all("load_hf", folder)

    def train(self, batch: SequenceBatch, *, lr: float, denominator: float, temperature: float = 1.0) -> StepResult:
        """One optimizer step on the batch."""
        return self.train_result(
            self.submit_train(batch, lr=lr, denominator=denominator, temperature=temperature), batch
        )

    def submit_train(
        self, batch: SequenceBatch, *, lr: float, denominator: float, temperature: float = 1.0
    ) -> list[ray.ObjectRef]:
        """Start a step without waiting: ranks take calls in order, so the next batch can be made meanwhile."""
        self._count(batch, passes=3)
        return self._submit("train", self._sent(batch), lr, denominator, temperature)

    def train_result(self, refs: list[ray.ObjectRef], batch: SequenceBatch) -> StepResult:
        parts: list[TrainResult] = [part for part in results(refs) if part is not None]
        return StepResult(
            values=merge_tables(batch, [part.table for part in parts])[0],
            loss=sum(part.loss for part in parts),
            metrics=add_up(part.metrics for part in parts),
            grad_norm=parts[0].grad_norm,
        )

    def score(
        self, batch: SequenceBatch, *, temperature: float = 1.0, weights: Weights = "current"
    ) -> dict[str, np.ndarray]:
        """Name -> [T]: log_probs, entropy, log_z, kept of every response token, without gradients."""
        return self.score_and_store(batch, temperature=temperature, weights=weights)[0]

    def score_and_store(
        self, batch: SequenceBatch, *, temperature: float = 1.0, weights: Weights = "current"
    ) -> tuple[dict[str, np.ndarray], StoredProxy]:
        """As `score`; and the proxy of the tokens that the batch marks as `proxy_wanted`."""
        self._count(batch, passes=1)
        tables = self._all("score", self._sent(batch), temperature, weights) if len(batch) else []
        return merge_tables(batch, [table for table in tables if table is not None])

    def logits(self, batch: SequenceBatch) -> np.ndarray:
        """[T, V]."""
        return merge_tables(batch, [t for t in self._all("logits", self._sent(batch)) if t is not None])[0]["logits"]

    def candidates(self, batch: SequenceBatch, *, temperature: float, count: int) -> dict[str, np.ndarray]:
        """candidate_ids, candidate_log_probs [T, count] where the batch marks a position as `wanted`."""
        tables = self._all("candidates", self._sent(batch), temperature, count)
        return merge_tables(batch, [table for table in tables if table is not None])[0]

    def start_profile(self) -> None:
        self._all("start_profile")

    def stop_profile(self, folder: Path) -> None:
        """A trace and tables a rank."""
        self._all("stop_profile", folder.resolve())

    def snapshot(self, name: Snapshot) -> None:
        """Keep the weights as they are now under that name."""
        self._all("snapshot", name)

    def submit_weights(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Start `connect_weights`, `push_weights` or `disconnect_weights` on all ranks: engines take part meanwhile."""
        return self._submit(method, *arguments)

    def publishers(self) -> list[tuple[str, int]]:
        """(address, open port) of the rank of each pipeline stage that sends its weights, in their order."""
        chosen = [rank for rank, publishes in zip(self.ranks, self._all("publishes"), strict=True) if publishes]
        hosts = results([rank.node_address.remote() for rank in chosen])
        ports = results([rank.call.remote("open_port", host) for rank, host in zip(chosen, hosts, strict=True)])
        return list(zip(hosts, ports, strict=True))

    def weight_specs(self) -> list[list[TensorSpec]]:
        """Of each pipeline stage, in their order."""
        return [specs for specs in self._all("weight_specs") if specs is not None]

    def state_bytes(self) -> int:
        """What a checkpoint will take, about."""
        return int(sum(self._all("state_bytes")))

    def write_state(self, folder: Path) -> list[RankPart]:
        """All ranks write their parts of a checkpoint."""
        return _when_all_are_done(self._submit("write_state", folder))

    def hold_state(self) -> None:
        """All ranks copy to CPU memory what `write_state` would write."""
        self._all("hold_state")

    def write_held(self, folder: Path) -> list[RankPart]:
        """All ranks write what they hold; calls made meanwhile do not wait for it."""
        return _when_all_are_done([rank.call_beside.remote("write_held", folder) for rank in self.ranks])

    def load(self, folder: Path) -> None:
        self._all("load", folder)

    def export_hf(self, folder: Path) -> list[HfShard]:
        return [shard for shards in self._all("export_hf", folder) for shard in shards or ()]

    def close(self) -> None:
        ray.wait(self._submit("close"), num_returns=len(self.ranks), timeout=CLOSE_SECONDS)
        for rank in self.ranks:
            ray.kill(rank)


def _when_all_are_done(refs: list[ray.ObjectRef]) -> list[Any]:
    """Results; after an error too, no rank is still writing."""
    try:
        return results(refs)
    finally:
        ray.wait(refs, num_returns=len(refs), timeout=SETTLE_SECONDS)


def merge_tables(batch: SequenceBatch, tables: list[Table]) -> tuple[dict[str, np.ndarray], StoredProxy]:
    """Tables of some rows each -> flat values, and stored entries, in the batch's own order."""
    merged: dict[str, np.ndarray] = {}
    proxies = []
    for table in tables:
        for name, values in table.values.items():
            if name not in merged:
                merged[name] = np.empty((batch.num_sampled_tokens, *values.shape[1:]), dtype=values.dtype)
            batch.set_values(merged[name], table.rows, values)
        if table.proxy is not None:
            proxies.append((batch.token_index(table.rows), table.proxy))
    return merged, StoredProxy.join(batch.num_sampled_tokens, proxies)
