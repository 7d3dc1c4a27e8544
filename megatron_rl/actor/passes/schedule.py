"""One pass over micro-batches through Megatron's pipeline schedule: forward and backward, or forward only.

Each loss is already divided by the global denominator, so micro-batches, data-parallel ranks and pipeline stages are
only added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.profiler import record_function

from megatron_rl.actor.optimizer.distributed import finish_without_backward
from megatron_rl.actor.passes.micro_batch import MicroBatch
from megatron_rl.utils import heartbeat

Result = TypeVar("Result")
OnHidden = Callable[[Tensor, MicroBatch], tuple[Tensor, Result]]
"""(hidden states after the last norm [s, b, d], micro-batch) -> (loss, result to collect)."""


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: list[MicroBatch],
    on_hidden: OnHidden[Result],
    *,
    backward: bool,
) -> list[Result]:
    """Returns the results of `on_hidden` for each micro-batch, on the last pipeline stage; an empty list on the others.

    Args:
        chunks: This rank's parts of the model. More than one means the interleaved schedule, which needs micro-batches
            of one length, and a number of them that is a multiple of the number of pipeline ranks.
        micro_batches: The micro-batches of this data-parallel replica.
        on_hidden: Called on the last pipeline stage for each micro-batch.
        backward: Whether to run backward passes too.

    Raises:
        ValueError: the interleaved schedule would exchange messages in batches.
    """
    config = get_model_config(chunks[0])
    if len(chunks) > 1 and (config.batch_p2p_comm or not config.overlap_p2p_comm):
        raise ValueError("interleaved with batched messages, gradients are wrong: only overlap_p2p_comm is allowed")
    if not micro_batches:
        if backward:  # this replica adds nothing, but the collectives of the others wait for this rank
            finish_without_backward(chunks)
        return []

    def forward(batches: Iterator[MicroBatch], stage: DistributedDataParallel) -> tuple[Tensor, Any]:
        batch = next(batches)
        heartbeat.notify(f"micro-batch {next(number)} of {len(micro_batches)}")
        with record_function("forward"):
            output = stage(batch.tokens, batch.positions, None, packed_seq_params=batch.packing, project=False)
        return output, partial(_collect, batch=batch, on_hidden=on_hidden)

    number = count(1)
    rows, length = micro_batches[0].tokens.shape
    iterators = [iter(micro_batches) for _ in chunks]
    with torch.set_grad_enabled(backward):
        results: list[Result] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=length * config.context_parallel_size,
            micro_batch_size=rows,
            forward_only=not backward,
        )
    return results


def _collect(hidden: Tensor, *, batch: MicroBatch, on_hidden: OnHidden[Result]) -> tuple[Tensor, Tensor, Result]:
    """Returns the loss with a token count of 1: Megatron would divide by the count, which has been done already."""
    with record_function("loss"):
        loss, result = on_hidden(hidden, batch)
    return loss, torch.ones((), dtype=torch.int32, device=loss.device), result
