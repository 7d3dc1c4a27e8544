"""Process groups of a layout, and this rank's position in them."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_rl.parallel.layout import Layout
from megatron_rl.utils.memory import Memory, fresh

TIMEOUT = timedelta(minutes=10)
"""Longer than any collective here takes, but short enough to notice a lost rank."""

SEED = 1


def backend(device: torch.device) -> str:
    """Returns the name of the torch.distributed backend for a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def init_process_groups(layout: Layout, *, rank: int, store: dist.Store, device: torch.device) -> None:
    """Joins the world and creates the process groups of `layout`. All ranks must pass the same store."""
    dist.init_process_group(
        backend(device),
        store=store,
        rank=rank,
        world_size=layout.world_size,
        timeout=TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=TIMEOUT // timedelta(minutes=1),
    )
    # Training draws no random numbers, but sequence parallelism and recompute require Megatron's generators.
    model_parallel_cuda_manual_seed(SEED)


def destroy() -> None:
    """Leaves every process group. Calling this function twice is safe."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def dp_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group()


def replicas_of(parameter: Tensor) -> dist.ProcessGroup:
    """Returns the ranks that hold the same shard of a parameter and sum its gradient."""
    if not getattr(parameter, "allreduce", True):  # Megatron's mark of an expert's weight
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def pp_group() -> dist.ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def expert_group() -> dist.ProcessGroup:
    """Returns the expert-parallel group: the ranks over which the experts are distributed."""
    return parallel_state.get_expert_model_parallel_group()


def expert_tp_group() -> dist.ProcessGroup:
    """Returns the ranks that split each expert."""
    return parallel_state.get_expert_tensor_parallel_group()


def expert_shards_group() -> dist.ProcessGroup:
    """Returns the ranks that together hold every expert of a layer. Ranks that split one expert are neighbours."""
    return parallel_state.get_expert_tensor_and_model_parallel_group()


def tp_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def dp_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def cp_group() -> dist.ProcessGroup:
    return parallel_state.get_context_parallel_group()


def cp_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def publisher(stage: int | None = None) -> int:
    """Returns the rank that publishes a pipeline stage's tensors on behalf of all its ranks: the stage's first. None
    means this rank's stage."""
    return (pp_rank() if stage is None else stage) * (dist.get_world_size() // pp_group().size())


def publishes() -> bool:
    """Returns whether this rank publishes its pipeline stage's tensors."""
    return dist.get_rank() == publisher()


def pp_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def is_first_stage() -> bool:
    return parallel_state.is_pipeline_first_stage()


def is_last_stage() -> bool:
    return parallel_state.is_pipeline_last_stage()


def gather_shards(local: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Returns the tensors of all ranks of a group in rank order, on every rank. All must have one shape. No gradient.

    In a group of one rank the result is the tensor itself, not a copy.
    """
    if group.size() == 1:
        return [local]
    shards = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def collect_shards(local: Tensor, group: dist.ProcessGroup, memory: Memory = fresh) -> list[Tensor]:
    """Like `gather_shards`, but only the publishing rank receives the shards, in `memory`; other ranks return [].

    A group without the publishing rank transfers nothing.
    """
    ranks = dist.get_process_group_ranks(group)
    if publisher() not in ranks:
        return []
    if not publishes():
        _run_transfers([dist.P2POp(dist.isend, local.contiguous(), publisher(), group)])
        return []
    others = [rank for rank in ranks if rank != publisher()]
    if not others:
        return [local]
    shards = dict(zip(others, memory(local, (len(others), *local.shape)), strict=True))
    _run_transfers([dist.P2POp(dist.irecv, shard, rank, group) for rank, shard in shards.items()])
    return [shards.get(rank, local) for rank in ranks]


def _run_transfers(transfers: list[dist.P2POp]) -> None:
    """Runs the transfers as one batch: for a single pair NCCL would create another communicator."""
    for work in dist.batch_isend_irecv(transfers):
        work.wait()


def gather_vocabulary(logits: Tensor) -> Tensor:
    """Gathers logits [..., padded vocabulary / tensor] into [..., padded vocabulary]. No gradient."""
    return torch.cat(gather_shards(logits.detach(), tp_group()), dim=-1)
