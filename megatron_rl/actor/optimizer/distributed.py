"""Data parallelism where gradients are sums: the loss arrives normalised over the global batch, so nothing divides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor


def wrap_ddp(model: GPTModel, *, distributed_optimizer: bool = False) -> DistributedDataParallel:
    """Megatron's DDP around one stage, its schedules told how to finish: after `get_forward_backward_func()(...)`
    every `parameter.main_grad` (fp32) is the sum over micro-batches and data-parallel ranks; with the distributed
    optimizer that holds for the part of it that this rank will step.

    A loss function returns (loss, token count, metrics); the count is ignored. Call `zero_grad_buffer()` before a step.
    """
    if not model.config.calculate_per_token_loss:
        raise ValueError("the model's config must say calculate_per_token_loss: Megatron divides gradients otherwise")
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, average_in_collective=False
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = _finalize_sums
    model.config.no_sync_func = wrapped.no_sync
    return wrapped


def wrap_chunks(chunks: Sequence[GPTModel], *, distributed_optimizer: bool) -> list[DistributedDataParallel]:
    """`wrap_ddp` of each chunk of a stage; the first one's config, which the schedule reads, then knows of all."""
    wrapped = [wrap_ddp(chunk, distributed_optimizer=distributed_optimizer) for chunk in chunks]
    if len(wrapped) > 1:
        chunks[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped]
    return wrapped


def _finalize_sums(models: list[DistributedDataParallel], num_tokens: Tensor | None = None, **settings: Any) -> None:
    """Megatron's, minus the division by the number of tokens."""
    finalize_model_grads(models, None, **settings)
