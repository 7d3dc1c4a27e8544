"""The passes of one rank over a batch of sequences: forward and backward of a step, and forwards without gradients.

Every method is collective. Only the reporting rank of each data-parallel replica returns a table; the others return
None. Legend: T sampled tokens of the batch, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

import lpreg
from megatron_rl.actor import platform
from megatron_rl.actor.passes.candidates import top_candidates
from megatron_rl.actor.passes.head import Head
from megatron_rl.actor.passes.micro_batch import MicroBatch, micro_batch
from megatron_rl.actor.passes.on_host import TABLE, Part, Scored, scored_table, table_of, train_result
from megatron_rl.actor.passes.results import Table, TrainResult
from megatron_rl.actor.passes.schedule import OnHidden, run_schedule
from megatron_rl.batching.packing import FLEX_BLOCK, PackingSpec, packed_length
from megatron_rl.batching.replicas import Batch, Sharing
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.models.architecture import Architecture
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.context_statistics import gather_rows
from megatron_rl.parallel.layout import Layout

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings

FP8_BLOCK = 128
"""Under FP8, with any scaling recipe, the number of tokens on a rank is a multiple of this."""

PROXY_ROWS = 8192
"""Tokens of which a proxy is stored at a time."""


class Passes:
    """Runs this rank's pipeline stage over its share of a batch."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        head: Head,
        architecture: Architecture,
        settings: ActorSettings,
        layout: Layout,
        device: torch.device,
    ) -> None:
        self.chunks, self.head, self.architecture, self.layout, self.device = chunks, head, architecture, layout, device
        fp8_block = 1 if settings.fp8 == "none" else FP8_BLOCK
        flex = platform.uses_flex(settings, device)
        multiple = layout.context * (layout.tensor if layout.sequence_parallel else 1) * fp8_block
        self.spec = PackingSpec(
            rows=platform.packing_form(settings, device),
            flex=flex,
            length_multiple=math.lcm(multiple, FLEX_BLOCK) if flex else multiple,
            context_ranks=layout.context,
            context_rank=process_groups.cp_rank(),
        )

        self.sharing = Sharing(
            replicas=layout.data,
            rows=self.spec.rows,
            token_budget=settings.micro_batch_tokens * layout.context,
            even_length=architecture.even_length,
            count_multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
            same_count=layout.expert > 1,  # ranks that share experts run every forward together
        )

    @property
    def reports(self) -> bool:
        """Whether this rank is the reporting rank of its data-parallel replica."""
        return process_groups.is_last_stage() and process_groups.tp_rank() == 0 and process_groups.cp_rank() == 0

    def gradients(
        self, batch: Batch, loss: lpreg.PolicyLoss | None, denominator: float, temperature: float
    ) -> TrainResult | None:
        """Runs forward and backward. Afterwards `main_grad` holds the sum over the whole batch.

        The gradient norm is not known yet. Without a loss, training is supervised.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            if loss is None:
                stats = self.head.statistics(self.head.predicting(hidden, part), part, part.targets, temperature)
                value, metrics = -stats.log_probs.sum() / denominator, {}
            else:
                output, stats = self.head.loss(hidden, part, loss, temperature=temperature, denominator=denominator)
                value, metrics = output.loss, output.metrics
            # Megatron divides the loss in place by the number of micro-batches, which is right for none of the copies.
            return value, Part(part.rows, [getattr(stats, name) for name in TABLE], value.detach().clone(), metrics)

        results, checks = self._run(batch, on_hidden, backward=True)
        return train_result(results, checks) if self.reports else None

    def score(self, batch: Batch, loss: lpreg.PolicyLoss | None, temperature: float) -> Table | None:
        """Returns log-prob, entropy, log Z and filter membership of every sampled token, without gradients.

        The batch may carry `probe_targets` [T]: then log-probs are those of the given tokens in place of the sampled
        ones. The batch may carry `proxy_wanted` [T] bool: then every tensor-parallel rank returns its columns of the
        proxy distribution of the marked tokens.

        `loss`: the loss whose settings of the statistics apply; None: the defaults of `lpreg.token_stats`.
        """
        settings = loss.token_stats_kwargs() if loss else {}

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            rows, targets = self.head.predicting(hidden, part), part.values.get("probe_targets", part.targets)
            stats = self.head.statistics(rows, part, targets, temperature, **settings)
            columns = [getattr(stats, name) for name in TABLE] if self.reports else []
            marked = None if part.marked is None else rows[part.marked]
            return stats.log_probs.sum(), Scored(part, columns, marked)

        results, checks = self._run(batch, on_hidden)
        marked = [part for part in results if part.marked is not None]
        with lpreg.postponed_checks() as more:
            entries = self._proxy_entries(marked, temperature, settings) if marked else []
        if not self.reports and not marked:
            return None
        return scored_table(results, entries, [*checks, *more])

    def _proxy_entries(self, marked: Sequence[Scored], temperature: float, settings: Mapping[str, Any]) -> list[Tensor]:
        """Returns counts, ids and log q of the proxy's entries of the marked tokens of all micro-batches.

        How many entries there are is known only after a wait for the GPU, so this comes after the last micro-batch.
        """
        rows = torch.cat([part.marked for part in marked if part.marked is not None])
        targets = torch.cat([part.batch.marked_targets for part in marked])
        stores = []
        with torch.no_grad():
            for some, sampled in zip(rows.split(PROXY_ROWS), targets.split(PROXY_ROWS), strict=True):
                every = torch.ones_like(sampled, dtype=torch.bool)
                stats = self.head.statistics_of(some, sampled, temperature, proxy_rows=every, **settings)
                assert stats.proxy_store is not None
                stores.append(stats.proxy_store)
        store = lpreg.ProxyStore.join(stores)
        return [store.counts, store.ids.int(), store.log_q.float()]

    def logits(self, batch: Batch) -> Table | None:
        """Returns gathered logits [T, V] of the sampled tokens, for checks on a few sequences."""

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            logits = self.head.logits(self.head.predicting(hidden, part))
            whole = process_groups.gather_vocabulary(logits)[:, : self.architecture.vocabulary].float()
            return logits.new_zeros(()), (part.rows, {"logits": gather_rows(whole, part.places, len(part.targets))})

        results, checks = self._run(batch, on_hidden)
        return table_of(results, checks) if self.reports else None

    def candidates(self, batch: Batch, temperature: float, count: int) -> Table | None:
        """Returns `candidate_ids` and `candidate_log_probs` [T, count]: the likeliest next tokens at each sampled token
        that the batch marks as `wanted`, the likeliest first; -1 and NaN at the others."""

        def on_hidden(hidden: Tensor, part: MicroBatch) -> tuple[Tensor, Any]:
            assert part.marked is not None
            rows = self.head.predicting(hidden, part)
            ids, log_probs = top_candidates(
                self.head.logits(rows[part.marked]),
                count,
                temperature=temperature,
                vocabulary=self.architecture.vocabulary,
                group=process_groups.tp_group(),
            )
            table = {}
            for name, values, nothing in (("candidate_ids", ids, -1), ("candidate_log_probs", log_probs, torch.nan)):
                column = values.new_full((rows.shape[0], count), nothing)
                column[:, : values.shape[1]].index_copy_(0, part.marked, values)
                table[name] = gather_rows(column, part.places, len(part.targets))
            return log_probs.new_zeros(()), (part.rows, table)

        results, checks = self._run(batch, on_hidden)
        return table_of(results, checks) if self.reports else None

    def _run(
        self, batch: Batch, on_hidden: OnHidden[Any], *, backward: bool = False
    ) -> tuple[list[Any], list[lpreg.PostponedCheck]]:
        """Returns the results of all micro-batches, and checks that the host has not read yet."""
        with lpreg.postponed_checks() as checks:
            return run_schedule(self.chunks, self._share(batch), on_hidden, backward=backward), checks

    def _share(self, batch: Batch) -> list[MicroBatch]:
        """Returns the micro-batches of this data-parallel replica."""
        replica = process_groups.dp_rank()
        own = self.sharing.part_of(batch, replica) if isinstance(batch, SequenceBatch) else batch
        if own.replica != replica:
            raise RuntimeError(f"replica {replica} got the sequences of replica {own.replica}")
        length = 0
        if self.layout.virtual_pipeline > 1:
            length = max((packed_length(own.sequences, rows, self.spec) for rows in own.micro_batches), default=0)
        return [
            replace(micro_batch(own.sequences, rows, self.device, self.spec, length), rows=tuple(own.rows[rows]))
            for rows in own.micro_batches
        ]
