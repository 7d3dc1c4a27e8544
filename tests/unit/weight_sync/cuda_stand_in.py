"""Stand-in for the CUDA runtime on machines without a GPU: its calls for shared memory, backed by host memory.

The arguments of the calls are real: addresses, and a handle of 64 bytes passed by value.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import nullcontext
from ctypes import CFUNCTYPE, POINTER, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.weight_sync import cuda_runtime
from megatron_rl.weight_sync.cuda_runtime import _Handle

FOLDER = "CUDA_STAND_IN_FOLDER"
"""Environment variable with the folder of the memory files and of the marks of mapped memory."""
STREAM = 77
OUT_OF_MEMORY, INVALID_VALUE, INVALID_HANDLE = 2, 1, 400
MESSAGE = ctypes.create_string_buffer(b"error of the stand-in")
MOST = 2**20


class StandIn:
    """The library, in place of the one that ctypes would load."""

    def __init__(self, name: str) -> None:
        assert name == "libcudart.so.12"
        self.folder = Path(os.environ[FOLDER])
        self.maps: dict[int, tuple[mmap.mmap, Path]] = {}
        out = POINTER(c_void_p)
        self.cudaMalloc = CFUNCTYPE(c_int, out, c_size_t)(self.malloc)
        self.cudaFree = CFUNCTYPE(c_int, c_void_p)(self.free)
        self.cudaMemcpyAsync = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_int, c_void_p)(self.copy)
        self.cudaIpcGetMemHandle = CFUNCTYPE(c_int, POINTER(_Handle), c_void_p)(self.handle)
        self.cudaIpcOpenMemHandle = CFUNCTYPE(c_int, out, _Handle, c_uint)(self.open)
        self.cudaIpcCloseMemHandle = CFUNCTYPE(c_int, c_void_p)(self.close)
        self.cudaGetLastError = CFUNCTYPE(c_int)(lambda: 0)
        self.cudaGetErrorString = CFUNCTYPE(c_void_p, c_int)(lambda status: ctypes.addressof(MESSAGE))

    def malloc(self, out: Any, nbytes: int) -> int:
        if nbytes > MOST:
            return OUT_OF_MEMORY
        path = self.folder / f"memory-{os.getpid()}-{len(self.maps)}"
        path.write_bytes(bytes(nbytes))
        return self.map(out, path, path)

    def map(self, out: Any, path: Path, mark: Path) -> int:
        """Map a file. mark: a file that exists as long as the mapping does."""
        mark.touch()
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.maps[address] = mapped, mark
        out[0] = address
        return 0

    def free(self, address: int) -> int:
        if address not in self.maps:
            return INVALID_VALUE
        self.maps.pop(address)[1].unlink()
        return 0

    def copy(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> int:
        if (kind, stream) != (4, STREAM):
            return INVALID_VALUE
        ctypes.memmove(to, source, nbytes)
        return 0

    def handle(self, out: Any, address: int) -> int:
        name = self.maps[address][1].name.encode()
        out[0].reserved[:] = (b"\0\xff\0" + name).ljust(64, b"\0")  # a handle is not text
        return 0

    def open(self, out: Any, handle: _Handle, flags: int) -> int:
        raw = bytes(handle)
        path = self.folder / raw[3:].rstrip(b"\0").decode()
        if raw[:3] != b"\0\xff\0" or flags != 1 or not path.exists():
            return INVALID_HANDLE
        return self.map(out, path, self.folder / f"opened-{os.getpid()}-{len(self.maps)}")

    def close(self, address: int) -> int:
        return self.free(address)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in in this process. Child processes call `take_over` themselves."""
    monkeypatch.setenv(FOLDER, str(folder))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(cuda_runtime, "ctypes", SimpleNamespace(CDLL=StandIn))
    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cuda_runtime._library.cache_clear()


def take_over(folder: Path) -> None:
    """Install the stand-in for the rest of this process."""
    install(folder, pytest.MonkeyPatch())
