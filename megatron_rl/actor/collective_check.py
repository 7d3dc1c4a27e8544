"""Checks the network without a model: each rank joins every process group of a layout and sums over it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megatron_rl.actor import platform
from megatron_rl.parallel import process_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.utils import rendezvous

MESSAGE = 2**20
"""Number of elements in the timed sum: 4 MiB."""


class CollectiveCheck:
    """One rank of the check. Call `run` on all ranks at once, with the address of rank 0 and its `open_port`."""

    def __init__(self, device: str, layout: Layout, rank: int) -> None:
        self.device, self.layout, self.rank = platform.prepare(device), layout, rank

    def open_port(self, host: str) -> int:
        """Opens a port at an address of this machine, where the ranks find each other. Returns the port."""
        return rendezvous.open_port(host)

    def run(self, host: str, port: int) -> dict[str, tuple[tuple[int, ...], float]]:
        """Returns, for each group with more than one rank, its name, its ranks and the seconds that a sum took.

        Raises RuntimeError if a sum is wrong, and torch's errors if the ranks do not find each other.
        """
        process_groups.init_process_groups(
            self.layout,
            rank=self.rank,
            store=rendezvous.store_at(host, port, process_groups.TIMEOUT),
            device=self.device,
        )
        groups = {
            "all ranks": dist.group.WORLD,
            "tensor parallel": process_groups.tp_group(),
            "pipeline parallel": process_groups.pp_group(),
            "data parallel": process_groups.dp_group(),
            "context parallel": process_groups.cp_group(),
            "expert parallel": process_groups.expert_group(),
        }
        try:
            return {
                name: (tuple(dist.get_process_group_ranks(group)), self._sum(name, group))
                for name, group in groups.items()
                if group is not None and group.size() > 1
            }
        finally:
            process_groups.destroy()

    def library(self) -> str:
        """Returns the communication library with its version."""
        if self.device.type != "cuda":
            return process_groups.backend(self.device)
        return f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} for CUDA {torch.version.cuda}"

    def _sum(self, name: str, group: dist.ProcessGroup) -> float:
        """Sums twice: once to connect, once to measure the time. Returns the seconds of the second sum."""
        for _ in range(2):
            values = torch.ones(MESSAGE, device=self.device)
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            wrong = int((values != group.size()).sum())  # also waits for the sum
            if wrong:
                raise RuntimeError(f"a sum over the {name} group of rank {self.rank} is wrong in {wrong} elements")
        return time.perf_counter() - start
