"""One pass over micro-batches through Megatron's pipeline schedule: forward and backward, or forward only.

Losses arrive already divided by the global denominator, so everything downstream only adds: micro-batches,
data-parallel ranks and pipeline stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_rl.actor.micro_batch import MicroBatch
from megatron_rl.observability import heartbeat

Result = TypeVar("Result")
OnLogits = Callable[[Tensor, MicroBatch], tuple[Tensor, Result]]
"""(this rank's logits of the response tokens [T, V / TP], micro-batch) -> (loss, what to collect)."""


def run_schedule(
    model: nn.Module, micro_batches: list[MicroBatch], on_logits: OnLogits[Result], *, backward: bool
) -> list[Result]:
    """What `on_logits` gave for each micro-batch; empty on every pipeline stage but the last."""
    if not micro_batches:
        if backward:  # this replica adds nothing, but the others wait for it to say so
            get_model_config(model).finalize_model_grads_func([model])
        return []

    def forward(batches: Iterator[MicroBatch], stage: nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        heartbeat.say(f"micro-batch {next(number)} of {len(micro_batches)}")
        with record_function("forward"):
            output = stage(batch.tokens, batch.positions, None)
        return output, partial(_collect, batch=batch, on_logits=on_logits)

    number = count(1)
    longest = max(batch.tokens.shape[1] for batch in micro_batches)
    with torch.set_grad_enabled(backward):
        results: list[Result] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=longest,
            micro_batch_size=micro_batches[0].tokens.shape[0],
            forward_only=not backward,
        )
    return results


def _collect(logits: Tensor, *, batch: MicroBatch, on_logits: OnLogits[Result]) -> tuple[Tensor, Tensor, Result]:
    """logits [b, s, V / TP]. The token count is Megatron's to divide by; ours is done, so it is unused."""
    rows = logits.flatten(0, 1).index_select(0, batch.predictors)
    with record_function("loss"):
        loss, result = on_logits(rows, batch)
    return loss, torch.ones((), dtype=torch.int32, device=loss.device), result
