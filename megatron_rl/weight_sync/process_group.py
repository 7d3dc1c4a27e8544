"""A process group between one rank of the actor and all engines, in addition to the groups that either side has."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megatron_rl.utils.rendezvous import store_at
from megatron_rl.weight_sync.transport import GroupMember

POLL_SECONDS, STORE_SECONDS = 0.001, 1.0
"""Intervals at which a member looks at a broadcast over NCCL, and at which it asks whether another member stopped."""
STOPPED = "stopped"
"""Key in the group's store by which a member tells the others that it has stopped."""
ABORT_FACTOR = 2
"""Torch's own limit for NCCL, in multiples of ours, which comes first. An abort may take as long as torch's limit."""
_UNWATCHED = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Torch's watchdog over NCCL ends the process after a failure. torch reads these variables as it makes a group."""


def join(member: GroupMember, index: int = 0) -> dist.ProcessGroup:
    """Join the group; blocks until all members have joined. Rank 0 must have opened the port.

    index: the process's index within its engine. torch has no public interface for a group whose members are not in one
    world. The engines use the same internal calls, down to the keys under which members find each other.
    """
    rank, timeout = member.rank + index, timedelta(seconds=member.timeout_seconds)
    store = store_at(member.host, member.port, timeout)
    name: Any = member.name  # its type `c10d.GroupName` is a string that torch 2.8 does not name yet
    with _environment(_UNWATCHED if member.backend == "nccl" else {}):
        group, _ = c10d._new_process_group_helper(
            member.size,
            rank,
            [],
            c10d.Backend(member.backend),
            c10d.PrefixStore(member.name, store),
            group_name=name,
            timeout=ABORT_FACTOR * timeout if member.backend == "nccl" else timeout,
        )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(member.size)}
    return group


def leave(group: dist.ProcessGroup) -> None:
    dist.destroy_process_group(group)


class BroadcastFailed(RuntimeError):
    """A broadcast failed, and this process has left its group."""


class BroadcastGroup:
    """A group in which rank 0 broadcasts. A broadcast that fails raises an error in time, whatever the backend.

    gloo notices by itself if a member fails, leaves or hangs. NCCL only enqueues work, and a GPU then waits for ever
    for a member that is gone. The members therefore look at the work, give up after the group's time limit, and abort
    the communicator, which frees the GPU. A member that gives up tells the others through the group's store.
    """

    def __init__(self, member: GroupMember, index: int = 0) -> None:
        """Blocks until all members have joined. index: the process's index within its engine."""
        self._nccl, self._limit = member.backend == "nccl", member.timeout_seconds
        self._group: dist.ProcessGroup | None = join(member, index)
        self._store: dist.Store = c10d._world.pg_map[self._group][1]
        self._stop = threading.Event()
        self._work: dist.Work | None = None

    def broadcast(self, flat: Tensor) -> None:
        """Send the tensor from rank 0 to all members. Raises BroadcastFailed and leaves the group if that fails."""
        self.start(flat)
        self.finish()

    def start(self, flat: Tensor) -> None:
        """Begin a broadcast, which `finish` completes; the tensor must not be used before. Raises BroadcastFailed."""
        assert self._work is None, "a broadcast is under way"
        self._raise(self._begin(flat))

    def finish(self) -> None:
        """Block until the broadcast that was started is complete; does nothing if none was. Raises BroadcastFailed."""
        self._raise(self._end())

    def _raise(self, failure: str) -> None:
        """Leaves the group if there is a failure.

        The error is a new one, since torch's own would keep the group alive, and gloo closes its connections only when
        the group is freed.
        """
        if failure:
            self.abort()
            raise BroadcastFailed(failure)

    def _begin(self, flat: Tensor) -> str:
        """Returns the failure's message, or ""."""
        if self._group is None:
            return "the process group is closed after an earlier failure"
        try:
            self._work = dist.broadcast(flat, group=self._group, group_src=0, async_op=True)
        except RuntimeError as error:
            return str(error) or type(error).__name__
        return ""

    def _end(self) -> str:
        """Returns the failure's message, or ""."""
        work, self._work = self._work, None
        try:
            if work is not None and self._nccl:
                self._await(work)
            if work is not None:
                work.wait()  # raises the error of work that has failed
        except RuntimeError as error:
            return str(error) or type(error).__name__
        return ""

    def _await(self, work: dist.Work) -> None:
        """Blocks until the work is done or has failed. Raises RuntimeError if it is stopped or takes too long."""
        deadline, ask = time.monotonic() + self._limit, time.monotonic() + STORE_SECONDS
        while not work.is_completed():
            now = time.monotonic()
            if self._stop.is_set():
                raise RuntimeError("the broadcast was stopped, since an engine failed")
            if now > deadline:
                raise RuntimeError(f"the broadcast took longer than {self._limit:g} s: a member hangs or is gone")
            if now > ask:
                ask = now + STORE_SECONDS
                if self._store.check([STOPPED]):
                    raise RuntimeError("another member of the broadcast has failed")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Make a broadcast that is under way in another thread fail; gloo notices by itself that a member failed."""
        self._stop.set()

    def abort(self) -> None:
        """Leave the group after a failure."""
        group, self._group, self._work = self._group, None, None
        if group is None:
            return
        if not self._nccl:
            leave(group)
            return
        try:
            self._store.set(STOPPED, "")
        except RuntimeError as error:  # the sender, which has the store, is gone: every member sees that
            print(f"the weights' group was aborted, and its store is gone: {error}", flush=True)
        c10d._abort_process_group(group)

    def leave(self) -> None:
        """Leave the group after its last broadcast has succeeded; a broadcast that is still under way is aborted."""
        if self._work is not None:
            self.abort()
        group, self._group = self._group, None
        if group is not None:
            leave(group)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables of this process for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
