"""Calls of the CUDA runtime for memory shared between processes, for which torch has no public interface."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_void_p
from functools import cache

import torch

_HANDLE_BYTES = 64
_COPY_BY_ADDRESS = 4
"""cudaMemcpyDefault: CUDA infers from the addresses where source and target are."""
_ENABLE_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess: also allows memory of another GPU."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_ubyte * _HANDLE_BYTES)]


_ARGUMENTS = {
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaMemcpyAsync": [c_void_p, c_void_p, c_size_t, c_int, c_void_p],
    "cudaIpcGetMemHandle": [POINTER(_Handle), c_void_p],
    "cudaIpcOpenMemHandle": [POINTER(c_void_p), _Handle, c_uint],
    "cudaIpcCloseMemHandle": [c_void_p],
}


def malloc(nbytes: int) -> int:
    """Allocate memory on the current GPU and return its address."""
    pointer = c_void_p()
    _call("cudaMalloc", byref(pointer), nbytes)
    return pointer.value or 0


def free(pointer: int) -> None:
    _call("cudaFree", pointer)


def copy(to: int, source: int, nbytes: int, stream: int) -> None:
    """Copy `nbytes` between two addresses in stream order."""
    _call("cudaMemcpyAsync", to, source, nbytes, _COPY_BY_ADDRESS, stream)


def ipc_handle(pointer: int) -> bytes:
    """Returns the handle by which other processes can map memory from `malloc`."""
    handle = _Handle()
    _call("cudaIpcGetMemHandle", byref(handle), pointer)
    return bytes(handle)


def ipc_open(handle: bytes) -> int:
    """Map another process's memory for use by the current GPU, and return its address in this process."""
    pointer = c_void_p()
    _call("cudaIpcOpenMemHandle", byref(pointer), _Handle.from_buffer_copy(handle), _ENABLE_PEER_ACCESS)
    return pointer.value or 0


def ipc_close(pointer: int) -> None:
    _call("cudaIpcCloseMemHandle", pointer)


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        _library().cudaGetLastError()  # otherwise torch's next call would report this error as its own
        raise RuntimeError(f"{name}: {_library().cudaGetErrorString(status).decode()} ({status})")


@cache
def _library() -> ctypes.CDLL:
    """Returns the CUDA runtime that torch has loaded."""
    if torch.version.cuda is None:
        raise RuntimeError("this torch is not built for CUDA")
    library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
    for name, types in _ARGUMENTS.items():
        getattr(library, name).argtypes = types
    library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = [c_int], c_char_p
    return library
