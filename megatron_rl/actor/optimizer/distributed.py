"""Data parallelism that sums gradients. The loss is already normalised over the global batch, so nothing is divided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from torch import Tensor


def wrap_ddp(
    model: GPTModel, *, distributed_optimizer: bool = False, overlap_grad_reduce: bool = False
) -> DistributedDataParallel:
    """Wraps one stage in Megatron's DDP and sets the hooks that Megatron's schedules call.

    overlap_grad_reduce: sum gradients over replicas while the last backward pass goes on. The gather of the new weights
    never overlaps: weights are published and copied right after a step, and the fused head reads its weight outside of
    the module whose hook would wait for it.

    After `get_forward_backward_func()(...)` every `parameter.main_grad` (fp32) is the sum over micro-batches and
    data-parallel ranks. With the distributed optimizer this holds for the part of `main_grad` that this rank steps.

    A loss function returns (loss, token count, metrics); the count is ignored. Call `zero_grad_buffer()` before a step.
    Raises ValueError if the model's config would make Megatron divide gradients.
    """
    if not model.config.calculate_per_token_loss:
        raise ValueError("the model's config must set calculate_per_token_loss, or Megatron divides gradients")
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grad_reduce,
        use_distributed_optimizer=distributed_optimizer,
        average_in_collective=False,
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = _finalize_sums
    model.config.no_sync_func = wrapped.no_sync
    return wrapped


def wrap_chunks(
    chunks: Sequence[GPTModel], *, distributed_optimizer: bool, overlap_grad_reduce: bool = False
) -> list[DistributedDataParallel]:
    """Wraps each chunk of a stage. The schedule reads the first chunk's config, which then covers all chunks."""
    wrapped = [
        wrap_ddp(chunk, distributed_optimizer=distributed_optimizer, overlap_grad_reduce=overlap_grad_reduce)
        for chunk in chunks
    ]
    if len(wrapped) > 1:
        chunks[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped]
    return wrapped


def announcer(chunk: DistributedDataParallel, weight: Tensor) -> Callable[[], None]:
    """Returns a function that tells DDP that the gradient of a weight is complete for a micro-batch.

    DDP learns this from autograd, which never sees a gradient that is added to `main_grad` by hand.
    """
    group = chunk.param_to_bucket_group[weight]
    return lambda: group.register_grad_ready(weight, chunk.force_all_reduce)


def finish_without_backward(chunks: Sequence[DistributedDataParallel]) -> None:
    """Takes part in the sums over replicas on a rank without micro-batches, whose gradients are zero."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.start_grad_sync()
    chunks[0].config.finalize_model_grads_func(list(chunks))


def _finalize_sums(models: list[DistributedDataParallel], num_tokens: Tensor | None = None, **settings: Any) -> None:
    """Calls Megatron's `finalize_model_grads` without the division by the number of tokens."""
    finalize_model_grads(models, None, **settings)
