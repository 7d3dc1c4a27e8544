"""A process group between one rank of the actor and engines, beside whatever groups either side has."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_rl.utils.rendezvous import store_at
from megatron_rl.weight_sync.transport import GroupMember


def join(member: GroupMember, index: int = 0) -> dist.ProcessGroup:
    """Returns when all have joined; rank 0 has opened the port. index: a process's place within its engine.

    torch has no public way to a group outside of the default one's world. This is what engines themselves do, down to
    the keys under which members find each other.
    """
    rank, timeout = member.rank + index, timedelta(seconds=member.timeout_seconds)
    store = store_at(member.host, member.port, timeout)
    group, _ = c10d._new_process_group_helper(
        member.size,
        rank,
        [],
        c10d.Backend(member.backend),
        c10d.PrefixStore(member.name, store),
        group_name=c10d.GroupName(member.name),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(member.size)}
    return group


def leave(group: dist.ProcessGroup) -> None:
    dist.destroy_process_group(group)
