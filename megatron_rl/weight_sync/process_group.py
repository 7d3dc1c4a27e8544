"""A process group between one rank of the actor and all engines, in addition to the groups that either side has."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_rl.utils.rendezvous import store_at
from megatron_rl.weight_sync.transport import GroupMember


def join(member: GroupMember, index: int = 0) -> dist.ProcessGroup:
    """Join the group; blocks until all members have joined. Rank 0 must have opened the port.

    index: the process's index within its engine. torch has no public interface for a group whose members are not in one
    world. The engines use the same internal calls, down to the keys under which members find each other.
    """
    rank, timeout = member.rank + index, timedelta(seconds=member.timeout_seconds)
    store = store_at(member.host, member.port, timeout)
    group, _ = c10d._new_process_group_helper(
        member.size,
        rank,
        [],
        c10d.Backend(member.backend),
        c10d.PrefixStore(member.name, store),
        group_name=cast(Any, member.name),  # newer releases of torch give this string a type of its own
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(member.size)}
    return group


def leave(group: dist.ProcessGroup) -> None:
    dist.destroy_process_group(group)
