"""Colocated engines on one node: the weights pass through memory that both sides map."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.weight_sync.transport import WeightUpdate, tensor_checksum

PREFIX = "megatron-rl-weights-"


def shared_folder() -> Path:
    """A fresh folder in shared memory, or in the temporary folder where there is none to write to.

    Folders that runs which were killed left there are removed: memory is what they would cost.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for stale in parent.glob(f"{PREFIX}*"):
        owner = stale.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))


class SharedMemoryTransport:
    """Implements `WeightTransport`. Only the newest version exists: call `push` when engines are done with the last."""

    def __init__(self, folder: Path, part: int) -> None:
        self.folder = folder
        self.part = part

    def connect(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int, *, checksums: bool) -> WeightUpdate:
        """Write this stage's tensors beside the old part, then replace it."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        path = self.folder / f"part-{self.part}.safetensors"
        fresh = path.with_suffix(".new")
        save_file(held, fresh)
        fresh.replace(path)
        return WeightUpdate(
            version=version,
            parts=(path,),
            checksums={name: tensor_checksum(tensor) for name, tensor in held.items()} if checksums else {},
            bytes=sum(tensor.nbytes for tensor in held.values()),
        )

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
