"""Memory of one process that other processes map: GPU memory through CUDA IPC, or host memory without a GPU.

The memory is not a tensor, because memory of torch's allocator cannot always be mapped: it may be part of a larger
block or of expandable segments. Bytes are copied in and out instead.
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
from megatron_rl.weight_sync.folder import shared_folder


class DeviceMemory(Protocol):
    """Memory that its owner writes and attached processes read; they synchronise by other means.

    Failures raise RuntimeError.
    """

    nbytes: int

    def address(self) -> str:
        """Returns the address that another process of this machine passes to `attach`."""
        ...

    def write(self, start: int, source: Tensor) -> None:
        """Copy the bytes of a contiguous tensor into the memory; complete when `wait` returns."""
        ...

    def read(self, start: int, into: Tensor) -> None:
        """Copy bytes of the memory into a contiguous tensor; complete when `wait` returns."""
        ...

    def wait(self) -> None:
        """Block until all copies have been made."""
        ...

    def all_attached(self) -> None:
        """Called once no more process will attach."""
        ...

    def close(self) -> None: ...


def allocate(nbytes: int, device: torch.device) -> DeviceMemory:
    return CudaMemory.allocate(nbytes, device) if device.type == "cuda" else HostMemory.allocate(nbytes)


def attach(address: str, device: torch.device) -> DeviceMemory:
    """Map the memory at an address. device: the reader's own device, which may differ from that of the memory."""
    where = json.loads(address)
    if "path" in where:
        return HostMemory(Path(where["path"]), where["bytes"])
    return CudaMemory.attach(base64.b64decode(where["handle"]), where["bytes"], device)


class HostMemory:
    """A file in shared memory.

    The file is unlinked once all processes have mapped it, so that nothing is left when processes are killed.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._bytes = torch.from_file(str(path), shared=True, size=nbytes, dtype=torch.uint8)

    @classmethod
    def allocate(cls, nbytes: int) -> HostMemory:
        path = shared_folder() / "weights"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # otherwise a lack of memory would show later, as a signal
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
        """Returns at once: `write` and `read` copy before they return."""

    def all_attached(self) -> None:
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def close(self) -> None:
        self.all_attached()
        self._bytes = torch.empty(0, dtype=torch.uint8)


class CudaMemory:
    """GPU memory.

    A process that maps it need not have that GPU among its visible ones. If the process uses another GPU, that GPU must
    be able to reach the memory (NVLink, PCIe).
    """

    def __init__(self, pointer: int, nbytes: int, device: torch.device, *, own: bool) -> None:
        self.pointer, self.nbytes, self.device, self.own = pointer, nbytes, device, own

    @classmethod
    def allocate(cls, nbytes: int, device: torch.device) -> CudaMemory:
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # memory that torch caches is not free for cudaMalloc
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
        """Does nothing: a handle holds no resource."""

    def close(self) -> None:
        pointer, self.pointer = self.pointer, 0
        if pointer:
            with torch.cuda.device(self.device):
                cuda_runtime.free(pointer) if self.own else cuda_runtime.ipc_close(pointer)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
