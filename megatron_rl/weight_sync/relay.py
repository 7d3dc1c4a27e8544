"""Brings weights to a folder in the shared memory of every node, without a file system that the nodes share.

The first rank of a pipeline stage broadcasts the stage's buckets, over a process group of the actor, to one rank on
each node that has engines. These ranks write what they receive, and the engines read their own node's folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.parallel import process_groups
from megatron_rl.utils import heartbeat
from megatron_rl.utils.memory import Reused
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, flattened, unflatten
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import NamedTensors, NodeFolders, Pushed


@dataclass(frozen=True, slots=True)
class _Stage:
    """One pipeline stage, as a rank sees it that sends or writes its weights."""

    first: int
    """The stage's first rank, which sends."""
    group: dist.ProcessGroup | None
    """The first rank and those that write on other nodes; None without such."""
    buckets: tuple[tuple[TensorSpec, ...], ...]
    folder: FolderTransport


class FolderRelay:
    """All methods are collective over the actor's ranks.

    The stages take turns. A rank may write the weights of one stage and hold shards of another; in any other order two
    ranks could wait for each other.
    """

    def __init__(self, folders: Sequence[NodeFolders], bucket_bytes: int, device: torch.device) -> None:
        """folders: of each pipeline stage; the stage's first rank is among the writers."""
        self.folders, self.bucket_bytes, self.device = folders, bucket_bytes, device
        self._memory = Reused()
        self._stages: list[_Stage | None] = []
        """None for a stage of which this rank writes nothing."""

    def connect(self, specs: Sequence[TensorSpec]) -> None:
        """Creates the groups and folders. specs: what this rank publishes of its own stage."""
        for stage, folders in enumerate(self.folders):
            first = process_groups.publisher(stage)
            ranks = sorted({first, *folders})
            apart = len(ranks) > 1
            group = dist.new_group(ranks, timeout=process_groups.TIMEOUT) if apart else None
            if dist.get_rank() not in ranks:
                self._stages.append(None)
                continue
            told = [list(specs)]
            if apart:
                dist.broadcast_object_list(told, src=first, group=group, device=self.device)
            folder = FolderTransport(folders[dist.get_rank()], stage, self.bucket_bytes)
            folder.connect()
            self._stages.append(_Stage(first, group, bucket_specs(told[0], self.bucket_bytes), folder))

    def push(
        self, tensors: NamedTensors, shards: Iterator[int], version: int, taker: ChecksumTaker | None = None
    ) -> Pushed | None:
        """Returns the report of the stage that this rank publishes. Raises UserError if this rank could not write,
        after it has served the other ranks.

        tensors: of the stage that this rank publishes. shards: on a rank that does not publish, `sends_shards`.
        """
        report, failure = None, None
        for number, stage in enumerate(self._stages):
            own = number == process_groups.pp_rank()
            publishes = own and process_groups.publishes()
            sending = shards if own and not publishes else iter(())
            if stage is not None:
                arriving = self._sent(tensors, stage) if publishes else self._received(stage, sending)
                try:
                    pushed = stage.folder.push(arriving, version, taker if publishes else None)
                    report = pushed if publishes else report
                except UserError as error:
                    failure = failure or error
                for _ in arriving:  # the other ranks need this one, also if its memory is full
                    pass
            for _ in sending:
                pass
        self._memory = Reused()  # its buffer is left to the engines, which may share this GPU
        if failure is not None:
            raise failure
        return report

    def _sent(self, tensors: NamedTensors, stage: _Stage) -> Iterator[tuple[str, Tensor]]:
        if stage.group is None:
            yield from tensors
            return
        flats = flattened(tensors, self.bucket_bytes, self._memory)
        for bucket, flat in zip(stage.buckets, flats, strict=True):
            heartbeat.notify(f"sending weights to other nodes, up to {bucket[-1].name}")
            dist.broadcast(flat, stage.first, group=stage.group)
            yield from unflatten(flat, bucket)

    def _received(self, stage: _Stage, sending: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
        """Yields the stage's tensors. Before each bucket this rank sends the shards that the first rank waits for."""
        like, needed, sent = torch.empty(0, dtype=torch.uint8, device=self.device), 0, 0
        for bucket in stage.buckets:
            needed += len(bucket)
            while sent <= needed and (step := next(sending, 0)):  # a bucket is full once the tensor after it is there
                sent += step
            heartbeat.notify(f"receiving weights of another node, up to {bucket[-1].name}")
            flat = self._memory(like, (sum(spec.nbytes for spec in bucket),))
            dist.broadcast(flat, stage.first, group=stage.group)
            yield from unflatten(flat, bucket)

    def close(self) -> None:
        """Removes this rank's folders. The groups stay until the actor ends."""
        for stage in self._stages:
            if stage is not None:
                stage.folder.close()
        self._stages = []
