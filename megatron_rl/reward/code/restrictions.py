"""The restrictions of a sandbox process, which hold until it ends. Standard library only.

A process applies them to itself, in this order: it dies with its parent; limits of processor time, memory, files;
Landlock, which confines it to a folder; no capabilities; the list of system calls.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

LARGEST_FILE = 16 * 2**20
OPEN_FILES = 64
STACK = 128 * 2**20
"""Most bytes of the main thread's stack, which is part of the address space. Linux keeps this room free. Recursion
through C, as in a function under lru_cache or a key of sorted, takes up to 2.5 KB a level in CPython 3.11."""
LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS


def die_with(parent: int) -> bool:
    """Ties the life of this process to its parent's. Returns whether the parent is still there."""
    LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    return os.getppid() == parent


def limit(memory_mb: int, seconds: float) -> None:
    memory, processor = memory_mb * 2**20, int(seconds) + 1
    most_stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK if most_stack == resource.RLIM_INFINITY else min(STACK, most_stack)
    for what, most in (
        (resource.RLIMIT_CPU, processor),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_STACK, stack),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def drop_capabilities() -> None:
    LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    LIBC.capset(header, struct.pack("<6I", *[0] * 6))


# Landlock (linux/landlock.h). Its three system calls have the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
NEWEST = 6
"""Newest version of Landlock whose rights are used. Version 1 suffices; later ones add a second line of defence."""
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_ALL_TCP, _ALL_SCOPES = 0b11, 0b11
"""From version 4: binding and connecting. From version 6: abstract sockets, and signals."""
_DIRECTORY_ONLY = _READ_DIR | ((1 << 14) - 1) & ~((1 << 4) - 1)


def confine_files(writable: Path, newest: int = NEWEST) -> bool:
    """Leaves access to Python's own files, for reading, and to one folder. Returns whether the kernel has Landlock.

    newest: the version of Landlock that is used if the kernel has a later one.
    """
    version = min(newest, LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    if version < 1:
        return False
    rights = _FILE_RIGHTS[min(version, 5)]
    handled = struct.pack("<Q", rights)
    handled += struct.pack("<Q", _ALL_TCP) if version >= 4 else b""
    handled += struct.pack("<Q", _ALL_SCOPES) if version >= 6 else b""
    ruleset = LIBC.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache"}
    readable |= {"/dev/urandom", "/dev/null", "/dev/zero", "/etc/localtime"}
    for path in map(Path, sorted(readable)):
        _allow(ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
    _allow(ruleset, Path("/dev/null"), _WRITE_FILE)
    _allow(ruleset, writable, rights)
    LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    taken: int = LIBC.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return taken == 0


def _allow(ruleset: int, path: Path, rights: int) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        rights &= ~_DIRECTORY_ONLY
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, handle), 12)
    LIBC.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    os.close(handle)
