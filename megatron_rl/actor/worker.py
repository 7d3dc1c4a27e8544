"""One rank of the actor: what the driver may ask of it. Knows nothing of Ray.

Every method is collective: the driver calls it on all ranks. Only the reporting rank of each data-parallel replica
(last pipeline stage, first tensor rank) returns tables; the other ranks return None.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

import lpreg
from megatron_rl.actor import platform, process_groups
from megatron_rl.actor.architecture import Architecture
from megatron_rl.actor.candidates import top_candidates
from megatron_rl.actor.distributed import wrap_chunks
from megatron_rl.actor.head import Head
from megatron_rl.actor.host import host_copy
from megatron_rl.actor.layout import Layout
from megatron_rl.actor.micro_batch import Form, MicroBatch, micro_batch, packed_length
from megatron_rl.actor.model import build_model
from megatron_rl.actor.optimizer import Optimizer
from megatron_rl.actor.policy_loss import LossChoice
from megatron_rl.actor.profiling import Profiler
from megatron_rl.actor.results import Snapshot, Table, TrainResult, Weights, add_up
from megatron_rl.actor.step import run_schedule
from megatron_rl.batching.rows import Rows
from megatron_rl.batching.share import share_out
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.checkpoint.hf_format import open_weights, read_config
from megatron_rl.checkpoint.hf_shards import HfShard
from megatron_rl.checkpoint.manifest import RankPart
from megatron_rl.checkpoint.state import HeldState, RankState, export_stage
from megatron_rl.checkpoint.weight_map import export_hf_weights, load_hf_weights
from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.collective import CollectiveTransport
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import GroupMember, Pushed, WeightTransport

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings, OptimizerSettings

FP8_BLOCK = 128
"""Tokens on a rank are a multiple of this under FP8, of any scaling."""

TABLE = ("log_probs", "entropy", "log_z", "kept")


class MegatronWorker:
    """A rank. Call `start` on all ranks at once, with the address of rank 0 and its `free_port`."""

    def __init__(self, settings: ActorSettings, layout: Layout, rank: int) -> None:
        self.settings = settings
        self.layout = layout
        self.rank = rank
        self.snapshots: dict[Snapshot, dict[str, Tensor]] = {}
        self.held: HeldState | None = None
        self.loss: lpreg.PolicyLoss | None = None
        self.transport: WeightTransport | None = None

    def free_port(self, host: str) -> int:
        """One for the process group, at an address of this machine."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])

    def start(self, host: str, port: int, model_folder: Path) -> str:
        """Join the process groups and build this rank's part of the model, its weights yet to come by `load_hf`.

        Returns what it runs on, for the log.
        """
        self.device = platform.prepare(self.settings.device)
        platform.require(self.device, self.settings)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        process_groups.init_process_groups(
            self.layout,
            rank=self.rank,
            world_size=self.layout.world_size,
            init_method=f"tcp://{host}:{port}",
            device=self.device,
        )
        self.dtype = getattr(torch, self.settings.dtype)
        self.hf_config = read_config(model_folder)
        chunks = [
            build_model(
                self.hf_config,
                layout=self.layout,
                dtype=self.dtype,
                device=self.device,
                pad_vocabulary=self.settings.pad_vocabulary,
                recompute=self.settings.recompute,
                fp8=self.settings.fp8,
                expert_gemm=self.settings.expert_gemm,
                chunk=chunk,
            )
            for chunk in range(self.layout.virtual_pipeline)
        ]
        self.model: nn.Module = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
        self.architecture = Architecture.from_hf(self.hf_config)
        self.form = _form(self.settings, self.layout)
        self.head = Head(chunks[-1], self.architecture.vocabulary, fused=self.settings.lm_head == "fused")
        spread = self.settings.distributed_optimizer and self.layout.data * self.layout.context > 1
        self.chunks = wrap_chunks(chunks, distributed_optimizer=spread)
        return platform.describe(self.dtype)

    def device_name(self) -> str:
        """Of this rank."""
        return platform.device_name()

    def load_hf(self, folder: Path) -> None:
        """Weights from a Hugging Face folder. The optimizer must be built anew afterwards."""
        load_hf_weights(self.model, self.hf_config, open_weights(folder))

    def build_optimizer(self, settings: OptimizerSettings) -> None:
        self.optimizer = Optimizer(self.chunks, settings, self.dtype, offload=self.settings.offload_optimizer)

    def set_loss(self, choice: LossChoice | None) -> None:
        """A policy loss; None for supervised training."""
        self.loss = choice.make() if choice else None

    # ------------------------------------------------------------------ passes

    def train(self, batch: Rows, lr: float, denominator: float, temperature: float) -> TrainResult | None:
        """One optimizer step. `denominator`: response tokens of the whole global batch, dropped rows included."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            if self.loss is None:
                stats = self.head.statistics(hidden, part, part.targets, temperature)
                loss, metrics = -stats.log_probs.sum() / denominator, {}
            else:
                output, stats = self.head.loss(
                    hidden, part, self.loss, temperature=temperature, denominator=denominator
                )
                loss, metrics = output.loss, {k: (float(m.total), float(m.count)) for k, m in output.metrics.items()}
            return loss, (part.rows, float(loss.detach()), metrics, _columns(stats))

        results = run_schedule(self.chunks, self._share(batch), on_hidden, backward=True)
        with record_function("optimizer"):
            grad_norm = self.optimizer.step(lr)
        if not self._reports:
            return None
        return TrainResult(
            table=_table([(rows, columns) for rows, _, _, columns in results]),
            loss=sum(loss for _, loss, _, _ in results),
            metrics=add_up(part for _, _, part, _ in results),
            grad_norm=grad_norm,
        )

    def score(self, batch: Rows, temperature: float, weights: Weights = "current") -> Table | None:
        """Log-prob, entropy, log Z and kept of every response token, without gradients.

        Rows may carry `probe_targets`: then log-probs are of those tokens in place of the sampled ones. They may carry
        `proxy_wanted`, bool: then every tensor rank returns its columns of the proxy of the tokens marked.
        """

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            targets, wanted = part.values.get("probe_targets", part.targets), part.values.get("proxy_wanted")
            settings = self.loss.token_stats_kwargs() if self.loss else {}
            stats = self.head.statistics(hidden, part, targets, temperature, proxy_rows=wanted, **settings)
            return stats.log_probs.sum(), ((part.rows, _columns(stats)), stats.proxy_store)

        with self._weights(weights):
            results = run_schedule(self.chunks, self._share(batch), on_hidden, backward=False)
        table = _table([part for part, _ in results])
        stores = [store for _, store in results if store is not None]
        if stores:
            return replace(table, values=table.values if self._reports else {}, proxy=_stored_proxy(stores))
        return table if self._reports else None

    def logits(self, batch: Rows) -> Table | None:
        """Whole logits [T, V] of the response tokens, gathered: for checks on a few rows."""

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            logits = self.head.logits(self.head.predicting(hidden, part))
            whole = process_groups.gather_vocabulary(logits)[:, : self.hf_config["vocab_size"]]
            return logits.new_zeros(()), (part.rows, {"logits": whole.float().cpu().numpy()})

        results = run_schedule(self.chunks, self._share(batch), on_hidden, backward=False)
        return _table(results) if self._reports else None

    def candidates(self, batch: Rows, temperature: float, count: int) -> Table | None:
        """`candidate_ids` and `candidate_log_probs` [T, count] of the likeliest next tokens, the first first, where the
        rows mark the position as `wanted`; -1 and NaN elsewhere."""

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            wanted = part.values["wanted"]
            logits = self.head.logits(self.head.predicting(hidden, part)[wanted])
            ids, log_probs = top_candidates(
                logits,
                count,
                temperature=temperature,
                vocabulary=self.architecture.vocabulary,
                group=process_groups.tp_group(),
            )
            table = {
                "candidate_ids": ids.new_full((len(wanted), count), -1),
                "candidate_log_probs": log_probs.new_full((len(wanted), count), torch.nan),
            }
            for name, values in (("candidate_ids", ids), ("candidate_log_probs", log_probs)):
                table[name][wanted, : values.shape[1]] = values
            return logits.new_zeros(()), (part.rows, {name: value.cpu().numpy() for name, value in table.items()})

        results = run_schedule(self.chunks, self._share(batch), on_hidden, backward=False)
        return _table(results) if self._reports else None

    def snapshot(self, name: Snapshot) -> None:
        """Keep the weights as they are now on the CPU, under that name."""
        self._keep(name, dict(self.model.named_parameters()))

    def start_profile(self) -> None:
        self.profiler = Profiler()
        self.profiler.start()

    def stop_profile(self, folder: Path) -> None:
        """Write what this rank ran since `start_profile`."""
        self.profiler.stop(folder, self.rank)

    # ------------------------------------------------------------------ weights out and in

    def publishes(self) -> bool:
        """Whether this rank hands its pipeline stage's tensors out, for all who have them."""
        return process_groups.tp_rank() == 0 and process_groups.is_first_replica()

    def weight_specs(self) -> list[TensorSpec] | None:
        """What `push_weights` will send, in its order."""
        specs = [TensorSpec.of(name, tensor) for name, tensor in export_hf_weights(self.model, self.hf_config)]
        return specs if self.publishes() else None

    def connect_weights(self, places: Sequence[Path | GroupMember], bucket_bytes: int) -> None:
        """Of each pipeline stage: the folder its weights go to, or its group with the engines, which must be joined by
        them meanwhile."""
        self.disconnect_weights()
        if not self.publishes():
            return
        stage = process_groups.pp_rank()
        place = places[stage]
        if isinstance(place, Path):
            self.transport = FolderTransport(place, stage, bucket_bytes)
        else:
            self.transport = CollectiveTransport(place, stage, bucket_bytes)
        self.transport.connect()

    def push_weights(self, version: int, checksums_for: int) -> Pushed | None:
        """Send this stage's weights, gathered to Hugging Face names tensor by tensor. Raises WeightsNotSent.

        checksums_for: tensor-parallel ranks of an engine; 0: no checksums.
        """
        tensors = export_hf_weights(self.model, self.hf_config)
        try:
            if self.transport is None:
                return None
            return self.transport.push(tensors, version, ChecksumTaker(checksums_for) if checksums_for else None)
        finally:
            for _ in tensors:  # the gathers are collective: who does not send, or stopped to, takes part all the same
                pass

    def disconnect_weights(self) -> None:
        if self.transport is not None:
            self.transport.close()
        self.transport = None

    def write_state(self, folder: Path) -> RankPart:
        """This rank's share of a checkpoint, written a file at a time."""
        return self._state().write(folder)

    def hold_state(self) -> None:
        """Copy to CPU memory what `write_state` would write."""
        self.held = self._state().held()

    def write_held(self, folder: Path) -> RankPart:
        """Write what `hold_state` copied. Touches nothing else, so it may run beside any other method."""
        held, self.held = self.held, None
        if held is None:
            raise RuntimeError("there is nothing to write: call hold_state() first")
        return held.write(folder)

    def state_bytes(self) -> float:
        """This rank's share of what a checkpoint takes."""
        return self._state().bytes

    def load(self, folder: Path) -> None:
        """The inverse of `write_state`, under any layout; random states come back where there are as many ranks."""
        if lagged := self._state().load(folder):
            self._keep("lagged", lagged)

    def export_hf(self, folder: Path) -> list[HfShard] | None:
        """This stage's files of a Hugging Face export; the driver writes the index."""
        return export_stage(folder, self.model, self.hf_config, process_groups.pp_rank(), self.publishes())

    def close(self) -> None:
        self.disconnect_weights()
        process_groups.destroy()

    # ------------------------------------------------------------------ inside

    @property
    def _reports(self) -> bool:
        return process_groups.is_last_stage() and process_groups.tp_rank() == 0 and process_groups.cp_rank() == 0

    def _state(self) -> RankState:
        return RankState(
            self.model, self.hf_config, self.optimizer, self.snapshots.get("lagged", {}), self.layout, self.rank
        )

    def _share(self, batch: Rows) -> list[MicroBatch]:
        """This replica's micro-batches."""
        interleaved = self.layout.virtual_pipeline > 1
        shares = share_out(
            batch.lengths.tolist(),
            self.layout.data,
            token_budget=self.settings.micro_batch_tokens * self.layout.context,
            packed=self.form.packed,
            even_length=self.architecture.even_length,
            count_multiple=self.layout.pipeline if interleaved else 1,
            same_count=self.layout.expert > 1,  # ranks that share experts run every forward together
        )
        own = shares[process_groups.dp_rank()]
        length = max((packed_length(batch, rows, self.form) for rows in own), default=0) if interleaved else 0
        return [micro_batch(batch, rows, self.device, self.form, length) for rows in own]

    def _keep(self, name: Snapshot, weights: Mapping[str, Tensor]) -> None:
        self.snapshots[name] = {n: host_copy(weight.detach(), self.device) for n, weight in weights.items()}

    @contextmanager
    def _weights(self, which: Weights) -> Iterator[None]:
        """Run with a snapshot's weights by pointing the parameters at them for a while."""
        if which == "current":
            yield
            return
        if which not in self.snapshots:
            raise RuntimeError(f"there is no {which} snapshot yet: call snapshot({which!r}) first")
        current = {name: param.data for name, param in self.model.named_parameters()}
        try:
            for name, param in self.model.named_parameters():
                param.data = self.snapshots[which][name].to(self.device, non_blocking=True)
            yield
        finally:
            for name, param in self.model.named_parameters():
                param.data = current[name]


def _form(settings: ActorSettings, layout: Layout) -> Form:
    fp8_block = 1 if settings.fp8 == "none" else FP8_BLOCK
    return Form(
        packed=settings.rows == "packed",
        length_multiple=layout.context * (layout.tensor if layout.sequence_parallel else 1) * fp8_block,
        context_ranks=layout.context,
        context_rank=process_groups.cp_rank(),
    )


def _columns(stats: lpreg.TokenStats) -> dict[str, np.ndarray]:
    return {name: getattr(stats, name).detach().cpu().numpy() for name in TABLE}


def _stored_proxy(stores: list[lpreg.ProxyStore]) -> StoredProxy:
    """Of consecutive micro-batches."""
    counts, ids, log_q = (
        torch.cat([getattr(store, name) for store in stores]).cpu() for name in ("counts", "ids", "log_q")
    )
    return StoredProxy(counts.numpy(), ids.int().numpy(), log_q.float().numpy())


def _table(parts: list[tuple[tuple[int, ...], dict[str, np.ndarray]]]) -> Table:
    names = parts[0][1] if parts else ()
    return Table(
        rows=np.array([row for rows, _ in parts for row in rows], dtype=np.int64),
        values={name: np.concatenate([columns[name] for _, columns in parts]) for name in names},
    )
