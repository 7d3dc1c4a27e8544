"""One rank of the actor, with the methods that the driver calls. Independent of Ray.

Every method is collective: the driver calls it on all ranks. Only the reporting rank of each data-parallel replica
(last pipeline stage, first tensor rank) returns tables; the other ranks return None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.profiler import record_function

import lpreg
from megatron_rl.actor import platform
from megatron_rl.actor.model.policy import Kernels, build_model
from megatron_rl.actor.optimizer.distributed import announcer, wrap_chunks
from megatron_rl.actor.optimizer.optimizer import Optimizer
from megatron_rl.actor.optimizer.snapshots import Snapshots
from megatron_rl.actor.passes.head import Head
from megatron_rl.actor.passes.passes import Passes
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.actor.passes.results import Snapshot, Table, TrainResult, Weights
from megatron_rl.actor.profiling import Profiler
from megatron_rl.actor.rank_state import HeldState, RankState, export_stage
from megatron_rl.batching.replicas import Batch, Sharing
from megatron_rl.checkpoint.manifest import RankPart
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_format import open_weights, read_config
from megatron_rl.models.hf_shards import HfShard
from megatron_rl.models.weight_map import load_hf_weights, publish_hf_weights, sends_shards
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.utils import rendezvous
from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.collective import CollectiveTransport
from megatron_rl.weight_sync.delta import DeltaTransport
from megatron_rl.weight_sync.folder import FolderTransport, shared_folder
from megatron_rl.weight_sync.mapped import MappedTransport
from megatron_rl.weight_sync.relay import FolderRelay
from megatron_rl.weight_sync.transport import GroupMember, NodeFolders, Pushed, WeightTransport

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings, OptimizerSettings


class MegatronWorker:
    """One rank of the actor. Call `start` on all ranks at once, with the address of rank 0 and its `open_port`."""

    def __init__(self, settings: ActorSettings, layout: Layout, rank: int) -> None:
        self.settings = settings
        self.layout = layout
        self.rank = rank
        self.held: HeldState | None = None
        self.loss: lpreg.PolicyLoss | None = None
        self.transport: WeightTransport | None = None
        self.relay: FolderRelay | None = None

    def open_port(self, host: str) -> int:
        """Opens a port at an address of this machine, where the ranks find each other. Returns the port."""
        return rendezvous.open_port(host)

    def start(self, host: str, port: int, model_folder: Path) -> str:
        """Joins the process groups and builds this rank's part of the model. Call `load_hf` afterwards.

        Returns a description of the platform for the log.
        """
        self.device = platform.prepare(self.settings.device, deterministic=self.settings.deterministic)
        platform.require(self.device, self.settings)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        process_groups.init_process_groups(
            self.layout,
            rank=self.rank,
            store=rendezvous.store_at(host, port, process_groups.TIMEOUT),
            device=self.device,
        )
        self.dtype = getattr(torch, self.settings.dtype)
        self.hf_config = read_config(model_folder)
        architecture = Architecture.from_hf(self.hf_config)
        chunks = [
            build_model(
                self.hf_config,
                layout=self.layout,
                dtype=self.dtype,
                device=self.device,
                pad_vocabulary=self.settings.pad_vocabulary,
                kernels=Kernels.of(self.settings, self.device, architecture),
                chunk=chunk,
            )
            for chunk in range(self.layout.virtual_pipeline)
        ]
        self.model: nn.Module = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
        self.snapshots = Snapshots(self.model)
        spread = self.settings.distributed_optimizer and self.layout.data * self.layout.context > 1
        overlap = platform.overlaps_grad_reduce(self.settings, self.device)
        self.chunks = wrap_chunks(chunks, distributed_optimizer=spread, overlap_grad_reduce=overlap)
        head = Head(chunks[-1], architecture.vocabulary, fused=self.settings.lm_head == "fused")
        if overlap and head.owns_weight:
            head.announce = announcer(self.chunks[-1], chunks[-1].head_weight)
        self.passes = Passes(self.chunks, head, architecture, self.settings, self.layout, self.device)
        return platform.describe(self.settings, experts=architecture.experts is not None)

    def device_name(self) -> str:
        """Returns the name of this rank's device."""
        return platform.device_name()

    def sharing(self) -> Sharing:
        """Returns how batches are divided over replicas."""
        return self.passes.sharing

    def load_hf(self, folder: Path) -> None:
        """Loads weights from a Hugging Face folder. Call `build_optimizer` again afterwards."""
        load_hf_weights(self.model, self.hf_config, open_weights(folder))

    def build_optimizer(self, settings: OptimizerSettings) -> None:
        self.optimizer = Optimizer(self.chunks, settings, self.dtype, offload=self.settings.offload_optimizer)

    def set_loss(self, choice: LossChoice | None) -> None:
        """Sets the policy loss; None means supervised training."""
        self.loss = choice.make() if choice else None

    # ------------------------------------------------------------------ passes

    def train(self, batch: Batch, lr: float, denominator: float, temperature: float) -> TrainResult | None:
        """Takes one optimizer step. `denominator`: sampled tokens of the global batch, including dropped sequences."""
        self.optimizer.zero_grad()
        result = self.passes.gradients(batch, self.loss, denominator, temperature)
        with record_function("optimizer"):
            grad_norm = self.optimizer.step(lr)
        return replace(result, grad_norm=grad_norm) if result else None

    def score(self, batch: Batch, temperature: float, weights: Weights = "current") -> Table | None:
        """Like `Passes.score`, with the actor's current weights or those of a snapshot."""
        with self.snapshots.in_use(weights):
            return self.passes.score(batch, self.loss, temperature)

    def logits(self, batch: Batch) -> Table | None:
        return self.passes.logits(batch)

    def candidates(self, batch: Batch, temperature: float, count: int) -> Table | None:
        return self.passes.candidates(batch, temperature, count)

    def release_memory(self) -> None:
        """Gives back GPU memory that torch has cached."""
        platform.release_memory()

    def snapshot(self, name: Snapshot) -> None:
        """Copies the current weights to CPU memory under this name."""
        self.snapshots.keep(name, dict(self.model.named_parameters()))

    def start_profile(self) -> None:
        self.profiler = Profiler()
        self.profiler.start()

    def stop_profile(self, folder: Path) -> None:
        """Writes the profile of what this rank ran since `start_profile`."""
        self.profiler.stop(folder, self.rank)

    # ------------------------------------------------------------------ weights out and in

    def publishes(self) -> bool:
        """Returns whether this rank publishes its pipeline stage's tensors on behalf of all its ranks."""
        return process_groups.publishes()

    def weight_specs(self) -> list[TensorSpec] | None:
        """Returns the specs of the tensors that `push_weights` sends, in order; None if this rank does not publish."""
        tensors = publish_hf_weights(self.model, self.hf_config, reuse_memory=True)
        specs = [TensorSpec.of(name, tensor) for name, tensor in tensors]
        return specs if self.publishes() else None

    def weights_folder(self) -> Path:
        """Makes a folder for weights in this node's shared memory, which is removed with the connection."""
        return shared_folder()

    def connect_weights(self, places: Sequence[Path | NodeFolders | GroupMember], bucket_bytes: int) -> None:
        """Connects this rank's pipeline stage to the destination of its weights.

        places: one per pipeline stage: the folder that receives the stage's weights, or one folder on each node, or the
        group that the stage shares with the engines. The engines must join that group at the same time.
        """
        self.disconnect_weights()
        folders = [place for place in places if isinstance(place, Mapping)]
        if folders:
            self.relay = FolderRelay(folders, bucket_bytes, self.device)
            self.relay.connect(self.weight_specs() or ())
            return
        if not self.publishes():
            return
        stage = process_groups.pp_rank()
        place = places[stage]
        assert not isinstance(place, Mapping)
        if isinstance(place, Path):
            self.transport = FolderTransport(place, stage, bucket_bytes)
        elif place.transport == "cuda_ipc":
            self.transport = MappedTransport(place, stage, bucket_bytes, self.device)
        elif place.transport == "delta":
            self.transport = DeltaTransport(place, stage, bucket_bytes)
        else:
            self.transport = CollectiveTransport(place, stage, bucket_bytes)
        self.transport.connect()

    def push_weights(self, version: int, checksums_for: int) -> Pushed | None:
        """Sends this stage's weights under Hugging Face names, gathered one tensor at a time. Raises WeightsNotSent,
        or UserError if the folder of weights is full.

        checksums_for: number of tensor-parallel ranks per engine; 0 means no checksums.
        """
        tensors = publish_hf_weights(self.model, self.hf_config, reuse_memory=True)
        kv_heads = Architecture.from_hf(self.hf_config).kv_heads
        taker = ChecksumTaker(checksums_for, kv_heads) if checksums_for else None
        if self.relay is not None:
            return self.relay.push(tensors, sends_shards(self.model, self.hf_config), version, taker)
        try:
            if self.transport is None:
                return None
            return self.transport.push(tensors, version, taker)
        finally:
            for _ in tensors:  # the gathers are collective: ranks that do not send, or failed to, must take part
                pass

    def stop_weights(self) -> None:
        """Makes a `push_weights` that is under way in another thread fail: an engine has failed."""
        if (transport := self.transport) is not None:
            transport.stop()

    def disconnect_weights(self) -> None:
        for connection in (self.transport, self.relay):
            if connection is not None:
                connection.close()
        self.transport = self.relay = None

    def write_state(self, folder: Path) -> RankPart:
        """Writes this rank's part of a checkpoint, one file at a time."""
        return self._state().write(folder)

    def hold_state(self) -> None:
        """Copies to CPU memory what `write_state` would write."""
        self.held = self._state().held()

    def write_held(self, folder: Path) -> RankPart:
        """Writes what `hold_state` copied. Uses nothing else, so this method may run in parallel with any other."""
        held, self.held = self.held, None
        if held is None:
            raise RuntimeError("there is nothing to write: call hold_state() first")
        return held.write(folder)

    def state_bytes(self) -> float:
        """Returns the size of this rank's part of a checkpoint."""
        return self._state().bytes

    def load(self, folder: Path) -> None:
        """Loads what `write_state` wrote, under any layout. The same number of ranks also restores random states."""
        if lagged := self._state().load(folder):
            self.snapshots.keep("lagged", lagged)

    def export_hf(self, folder: Path) -> list[HfShard] | None:
        """Writes this stage's files of a Hugging Face export. The driver writes the index."""
        return export_stage(folder, self.model, self.hf_config, process_groups.pp_rank(), self.publishes())

    def close(self) -> None:
        self.disconnect_weights()
        process_groups.destroy()

    # ------------------------------------------------------------------ internals

    def _state(self) -> RankState:
        return RankState(
            self.model, self.hf_config, self.optimizer, self.snapshots.get("lagged"), self.layout, self.rank
        )
