"""The actor: one process per rank, behind one interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import numpy as np
import ray
from ray import ObjectRef

from megatron_rl.actor.interface import ActorRank
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.passes.results import Snapshot, Sums, TrainResult, Weights, add_up, merge_tables
from megatron_rl.actor.platform import environment
from megatron_rl.batching.replicas import ReplicaBatch
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.checkpoint.manifest import RankPart
from megatron_rl.cluster.runtime import Nodes, host_process, progress_deadline, results, shared
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.flops import pass_flops
from megatron_rl.models.hf_format import read_config
from megatron_rl.models.hf_shards import HfShard
from megatron_rl.parallel.layout import Layout
from megatron_rl.utils.hardware import known_gpu
from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.transport import NodeFolders

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings, OptimizerSettings


R = TypeVar("R")
P = ParamSpec("P")

CLOSE_SECONDS = 5
"""Time that the ranks get to end by themselves, all together."""
MEANWHILE_SECONDS = 0.02
"""Interval of the calls of `Actors.meanwhile`."""
CHECK_SECONDS = 5.0
"""Interval at which the processes' progress is looked at between these calls."""
SETTLE_SECONDS = 60
"""Time that the other ranks get to finish a call after one rank has failed."""

LOSS_SECONDS = 10
"""Time in which Ray notices that the process of a rank has ended, after another rank has missed it."""


BROKEN_CONNECTION = ("gloo/transport", "ncclRemoteError", "ncclSystemError", "DistNetworkError")
"""Parts of the errors of torch if a connection between ranks breaks. Those of NCCL are by its documentation; only those
of gloo have been seen."""


class RanksLost(UserError):
    """Processes of the actor have ended by themselves, perhaps with their node, or have lost their connections: the
    same run may succeed later."""

    status = 1


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """Result of an optimizer step over all data-parallel replicas."""

    values: dict[str, np.ndarray]
    """Name -> [T]: log_probs, entropy, log_z and in_filter of the sampled tokens, before the update."""
    loss: float
    metrics: Sums
    grad_norm: float
    """Norm of the gradient before clipping."""


class Actors:
    """All ranks of the Megatron actor. Weights are undefined until `load_hf` or `load`. Legend: T sampled tokens."""

    meanwhile: Callable[[], None] | None = None
    """Called again and again while the driver waits for scores and updates; it must return soon."""

    def __init__(self, settings: ActorSettings, layout: Layout, model_folder: Path, logs: Path, nodes: Nodes) -> None:
        self.stages = layout.pipeline
        self.placement = nodes.placement
        variables = environment.rank_environment(settings) if nodes.placement.on_gpu else environment.ON_CPU
        self._logs = logs
        self.ranks = [
            host_process(
                partial(_worker, settings, layout, rank),
                log_file=logs / f"actor-rank-{rank}.log",
                nodes=nodes,
                node=node,
                gpus=int(nodes.placement.on_gpu),
                variables=variables,
            )
            for rank, node in enumerate(nodes.placement.actors)
        ]
        if nodes.placement.shared:
            nodes.rank_devices = results([rank.devices() for rank in self.ranks])
        host = results([self.ranks[0].node_address()])[0]
        port = results([self.ranks[0].submit(ActorRank.open_port, host)])[0]
        self.description: str = self._all(ActorRank.start, host, port, model_folder)[0]
        if nodes.placement.on_gpu:
            self.description += f"\n  {environment.describe(variables)}"
        self._layout = layout
        self._sharing = results([self.ranks[0].submit(ActorRank.sharing)])[0]
        self.gpu = known_gpu(results([self.ranks[0].submit(ActorRank.device_name)])[0])
        """The actor's GPU; None on a CPU, and for a GPU of unknown rate."""
        self._model = Architecture.from_hf(read_config(model_folder))
        self.flops = 0.0
        """Number of operations of all ranks so far. Each sequence counts as if it were computed alone; recomputation in
        the backward pass is not counted."""

    def submit(
        self, method: Callable[Concatenate[ActorRank, P], R], *arguments: P.args, **named: P.kwargs
    ) -> list[ObjectRef[R]]:
        """Calls a method on all ranks without waiting, such as `submit(ActorRank.push_weights, version, 0)`."""
        return [rank.submit(method, *arguments, **named) for rank in self.ranks]

    def stop_weights(self) -> None:
        """Makes a `push_weights` under way fail, while the ranks are still busy with it."""
        for rank in self.ranks:
            rank.submit_beside(ActorRank.stop_weights)

    def _all(self, method: Callable[Concatenate[ActorRank, P], R], *arguments: P.args, **named: P.kwargs) -> list[R]:
        return results(self.submit(method, *arguments, **named))

    def _submit_parts(
        self,
        method: Callable[Concatenate[ActorRank, ReplicaBatch, P], R],
        batch: SequenceBatch,
        *arguments: P.args,
        **named: P.kwargs,
    ) -> list[ObjectRef[R]]:
        """Calls a method on all ranks without waiting, each with its replica's part of the batch."""
        last, users = self._layout.pipeline - 1, self._layout.tensor * self._layout.context
        complete, bare = list[ReplicaBatch](), list[ReplicaBatch]()
        for part in self._sharing.divide(batch):
            complete.append(self._sent(part, users))
            if last:
                bare.append(self._sent(part.without_values(), users * last))
        calls = []
        for number, rank in enumerate(self.ranks):
            parts = complete if self._layout.stage_of(number) == last else bare
            calls.append(rank.submit(method, parts[self._layout.replica_of(number)], *arguments, **named))
        return calls

    def _sent(self, part: ReplicaBatch, users: int) -> ReplicaBatch:
        """Returns a replica's part of a batch as an argument of `submit` for so many ranks."""
        return shared(part, users)

    def _awaited(self, refs: list[ObjectRef[R]]) -> list[R]:
        """The results, with `meanwhile` called until the first of them is there."""
        deadline, checked = progress_deadline(), time.monotonic()
        while self.meanwhile and refs and not ray.wait(refs, timeout=MEANWHILE_SECONDS)[0]:
            self.meanwhile()
            if deadline and time.monotonic() - checked > CHECK_SECONDS:
                deadline.check(progress=False)
                checked = time.monotonic()
        return results(refs)

    def _count(self, batch: SequenceBatch, passes: int) -> None:
        """`passes`: number of forward passes; a backward pass counts as two."""
        self.flops += passes * pass_flops(self._model, batch.lengths.tolist(), batch.num_sampled_tokens)

    def prepare(self, loss: LossChoice | None, optimizer: OptimizerSettings) -> None:
        """Sets the policy loss (None: supervised training) and builds a fresh optimizer."""
        self._all(ActorRank.set_loss, loss)
        self._all(ActorRank.build_optimizer, optimizer)

    def load_hf(self, folder: Path) -> None:
        self._all(ActorRank.load_hf, folder)

    def train(self, batch: SequenceBatch, *, lr: float, denominator: float, temperature: float = 1.0) -> StepResult:
        """Runs one optimizer step on the batch."""
        return self.train_result(
            self.submit_train(batch, lr=lr, denominator=denominator, temperature=temperature), batch
        )

    def submit_train(
        self, batch: SequenceBatch, *, lr: float, denominator: float, temperature: float = 1.0
    ) -> list[ObjectRef[TrainResult | None]]:
        """Starts an optimizer step without waiting, so that the caller can prepare the next batch meanwhile. Ranks run
        calls in order."""
        self._count(batch, passes=3)
        return self._submit_parts(ActorRank.train, batch, lr, denominator, temperature)

    def train_result(self, refs: list[ObjectRef[TrainResult | None]], batch: SequenceBatch) -> StepResult:
        """Waits for the step that `submit_train` started on the batch, and returns its result."""
        parts: list[TrainResult] = [part for part in self._awaited(refs) if part is not None]
        return StepResult(
            values=merge_tables(batch, [part.table for part in parts])[0],
            loss=sum(part.loss for part in parts),
            metrics=add_up(part.metrics for part in parts),
            grad_norm=parts[0].grad_norm,
        )

    def score(
        self, batch: SequenceBatch, *, temperature: float = 1.0, weights: Weights = "current"
    ) -> dict[str, np.ndarray]:
        """Returns name -> [T]: log_probs, entropy, log_z and in_filter of every sampled token, without gradients."""
        return self.score_and_store(batch, temperature=temperature, weights=weights)[0]

    def score_and_store(
        self, batch: SequenceBatch, *, temperature: float = 1.0, weights: Weights = "current"
    ) -> tuple[dict[str, np.ndarray], StoredProxy]:
        """Returns the scores as `score` does, and the proxy distribution of the tokens marked as `proxy_wanted`."""
        self._count(batch, passes=1)
        calls = self._submit_parts(ActorRank.score, batch, temperature, weights) if len(batch) else []
        tables = self._awaited(calls)
        return merge_tables(batch, [table for table in tables if table is not None])

    def logits(self, batch: SequenceBatch) -> np.ndarray:
        """Returns [T, V], the logits that predict the sampled tokens, for checks on a few sequences."""
        tables = results(self._submit_parts(ActorRank.logits, batch))
        return merge_tables(batch, [table for table in tables if table is not None])[0]["logits"]

    def candidates(self, batch: SequenceBatch, *, temperature: float, count: int) -> dict[str, np.ndarray]:
        """Returns `candidate_ids` and `candidate_log_probs` [T, count] of the likeliest next tokens at each sampled
        token that the batch marks as `wanted`."""
        tables = results(self._submit_parts(ActorRank.candidates, batch, temperature, count))
        return merge_tables(batch, [table for table in tables if table is not None])[0]

    def start_profile(self) -> None:
        self._all(ActorRank.start_profile)

    def stop_profile(self, folder: Path) -> None:
        """Writes a trace and tables of each rank into the folder."""
        self._all(ActorRank.stop_profile, folder.resolve())

    def snapshot(self, name: Snapshot) -> None:
        """Keeps a copy of the present weights under that name."""
        self._all(ActorRank.snapshot, name)

    def release_memory(self) -> None:
        """Makes the ranks leave to the engines all GPU memory that they do not use, if they share GPUs."""
        if self.placement.shared:
            self._all(ActorRank.release_memory)

    def publishers(self) -> list[tuple[str, int]]:
        """Returns (address, open port) of the rank that sends the weights of each pipeline stage, in stage order."""
        chosen = [rank for rank, publishes in zip(self.ranks, self._all(ActorRank.publishes), strict=True) if publishes]
        hosts = results([rank.node_address() for rank in chosen])
        ports = results([rank.submit(ActorRank.open_port, host) for rank, host in zip(chosen, hosts, strict=True)])
        return list(zip(hosts, ports, strict=True))

    def node_folders(self) -> tuple[dict[int, Path], list[NodeFolders]]:
        """Makes a folder in the shared memory of each node that has engines or a first rank of a stage.

        Returns the folders by node, and what `ActorRank.connect_weights` takes for each stage. Raises UserError as
        `Placement.writers` does.
        """
        stages = self.placement.writers(self.stages)
        ranks = {node: rank for stage in stages for node, rank in stage.items()}
        made = results([self.ranks[rank].submit(ActorRank.weights_folder) for rank in ranks.values()])
        folders = dict(zip(ranks, made, strict=True))
        return folders, [{rank: folders[node] for node, rank in stage.items()} for stage in stages]

    def weight_specs(self) -> list[list[TensorSpec]]:
        """Returns the tensors that each pipeline stage sends, in stage order."""
        return [specs for specs in self._all(ActorRank.weight_specs) if specs is not None]

    def state_bytes(self) -> int:
        """Returns the approximate size of a checkpoint."""
        return int(sum(self._all(ActorRank.state_bytes)))

    def write_state(self, folder: Path) -> list[RankPart]:
        """Makes all ranks write their parts of a checkpoint."""
        return _when_all_are_done(self.submit(ActorRank.write_state, folder))

    def hold_state(self) -> None:
        """Makes all ranks copy the state that `write_state` would write to CPU memory."""
        self._all(ActorRank.hold_state)

    def write_held(self, folder: Path) -> list[RankPart]:
        """Makes all ranks write the state that they hold. Other calls do not wait for this one."""
        return _when_all_are_done([rank.submit_beside(ActorRank.write_held, folder) for rank in self.ranks])

    def load(self, folder: Path) -> None:
        self._all(ActorRank.load, folder)

    def export_hf(self, folder: Path) -> list[HfShard]:
        return [shard for shards in self._all(ActorRank.export_hf, folder) for shard in shards or ()]

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """Raises RanksLost instead of an error in the block if ranks have ended, or cannot reach each other: the error
        is often that of another rank, which misses them."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if lost := self._lost():
                logs = ", ".join(str(self._logs / f"actor-rank-{rank}.log") for rank in lost)
                raise RanksLost(
                    f"the process of actor rank {', '.join(map(str, lost))} has ended. Its log may say why: {logs}; "
                    "without a reason there, look for the OOM killer in dmesg"
                ) from error
            if any(mark in str(error) for mark in BROKEN_CONNECTION):
                raise RanksLost(
                    "a connection between ranks of the actor broke, though the processes of all ranks are there "
                    f"({str(error).splitlines()[-1][:300]}). Look at the network between their nodes; the logs are "
                    f"{self._logs}/actor-rank-*.log"
                ) from error
            raise

    def _lost(self) -> list[int]:
        """Returns the ranks whose processes have ended. A rank that is busy or hangs does not count."""
        asked, lost = {rank.node_address(): i for i, rank in enumerate(self.ranks)}, list[int]()
        waiting, until = list(asked), time.monotonic() + LOSS_SECONDS
        while waiting and (left := until - time.monotonic()) > 0:
            ready, waiting = ray.wait(waiting, timeout=left)
            for answer in ready:
                try:
                    ray.get(answer)
                except ray.exceptions.RayActorError:
                    lost.append(asked[answer])
                    until = time.monotonic() + 1  # others that ended with it are known by then
        return sorted(lost)

    def close(self) -> None:
        ray.wait(self.submit(ActorRank.close), num_returns=len(self.ranks), timeout=CLOSE_SECONDS)
        for rank in self.ranks:
            rank.kill()


def _worker(settings: ActorSettings, layout: Layout, rank: int) -> ActorRank:
    from megatron_rl.actor.worker import MegatronWorker

    return MegatronWorker(settings, layout, rank)


def _when_all_are_done(refs: list[ObjectRef[R]]) -> list[R]:
    """Returns the results. Waits for the other ranks after an error too, so that no rank is still writing."""
    try:
        return results(refs)
    finally:
        ray.wait(refs, num_returns=len(refs), timeout=SETTLE_SECONDS)
