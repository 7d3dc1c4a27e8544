"""Memory of one process that others map: a GPU's by CUDA IPC; without a GPU, the host's.

It is no tensor, as torch's own memory cannot always be mapped: it may be part of a larger block, or of segments that
grow. So bytes are copied in and out.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.weight_sync import cuda_runtime
from megatron_rl.weight_sync.shared_memory import shared_folder


class DeviceMemory(Protocol):
    """Its owner writes, those who have mapped it read; they agree on when by other means. Errors are RuntimeErrors."""

    nbytes: int

    def address(self) -> str:
        """By which another process of this machine can `attach`."""
        ...

    def write(self, start: int, source: Tensor) -> None:
        """Bytes of a contiguous tensor, there when `wait` returns."""
        ...

    def read(self, start: int, into: Tensor) -> None:
        """The same the other way."""
        ...

    def wait(self) -> None: ...

    def all_attached(self) -> None:
        """Nobody will ask for it by its address any more."""
        ...

    def close(self) -> None: ...


def allocate(nbytes: int, device: torch.device) -> DeviceMemory:
    return CudaMemory.allocate(nbytes, device) if device.type == "cuda" else HostMemory.allocate(nbytes)


def attach(address: str, device: torch.device) -> DeviceMemory:
    """device: the reader's own, whichever the memory is on."""
    where = json.loads(address)
    if "path" in where:
        return HostMemory(Path(where["path"]), where["bytes"])
    return CudaMemory.attach(base64.b64decode(where["handle"]), where["bytes"], device)


class HostMemory:
    """A file in shared memory. It has a name only until all have mapped it, so that nothing stays when processes are
    killed."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._bytes = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    @classmethod
    def allocate(cls, nbytes: int) -> HostMemory:
        path = shared_folder() / "weights"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # else a lack of it would show as a signal, later
        return cls(path, nbytes)

    def address(self) -> str:
        return json.dumps({"path": str(self.path), "bytes": self.nbytes})

    def write(self, start: int, source: Tensor) -> None:
        data = _bytes(source)
        self._bytes[start : start + data.numel()].copy_(data)

    def read(self, start: int, into: Tensor) -> None:
        data = _bytes(into)
        data.copy_(self._bytes[start : start + data.numel()])

    def wait(self) -> None:
        """Copies have been made when the calls return."""

    def all_attached(self) -> None:
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def close(self) -> None:
        self.all_attached()
        self._bytes = torch.empty(0, dtype=torch.uint8)


class CudaMemory:
    """Of a GPU. Whoever maps it need not see that GPU among its own; its own must reach it (NVLink, PCIe) if it is
    another one."""

    def __init__(self, pointer: int, nbytes: int, device: torch.device, *, own: bool) -> None:
        self.pointer, self.nbytes, self.device, self.own = pointer, nbytes, device, own

    @classmethod
    def allocate(cls, nbytes: int, device: torch.device) -> CudaMemory:
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # what torch keeps for later is not free for others
            return cls(cuda_runtime.malloc(nbytes), nbytes, device, own=True)

    @classmethod
    def attach(cls, handle: bytes, nbytes: int, device: torch.device) -> CudaMemory:
        with torch.cuda.device(device):
            return cls(cuda_runtime.ipc_open(handle), nbytes, device, own=False)

    def address(self) -> str:
        with torch.cuda.device(self.device):
            handle = cuda_runtime.ipc_handle(self.pointer)
        return json.dumps({"handle": base64.b64encode(handle).decode(), "bytes": self.nbytes})

    def write(self, start: int, source: Tensor) -> None:
        self._copy(self.pointer + start, source.data_ptr(), source.nbytes)

    def read(self, start: int, into: Tensor) -> None:
        self._copy(into.data_ptr(), self.pointer + start, into.nbytes)

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        with torch.cuda.device(self.device):
            cuda_runtime.copy(to, source, nbytes, torch.cuda.current_stream(self.device).cuda_stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()

    def all_attached(self) -> None:
        """A handle costs nothing."""

    def close(self) -> None:
        pointer, self.pointer = self.pointer, 0
        if pointer:
            with torch.cuda.device(self.device):
                cuda_runtime.free(pointer) if self.own else cuda_runtime.ipc_close(pointer)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
